#!/usr/bin/env bash
# DeepSpeed's launcher in the project's environment, with the arguments as they are, for example
#   bash launch/train.sh --num_accelerators 2 --module megaresid.train --deepspeed_config ds_configs/zero1.json \
#       --data data/python-docs --model tiny --steps 200 --run-dir runs/first
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec deepspeed "$@"
