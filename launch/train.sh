#!/usr/bin/env bash
# Trains in the project's environment under DeepSpeed's launcher, with the arguments as they are, for example
#   bash launch/train.sh --num_accelerators 2 --module megaresid.train --deepspeed_config ds_configs/zero1.json \
#       --data data/python-docs --model tiny --steps 200 --run-dir runs/first
# Or under the program that the arguments begin with: torchrun --nproc-per-node 2 -m megaresid.train …, or
# python -m megaresid.train …
#
# SIGTERM, SIGINT (Ctrl-C) and SIGHUP save a checkpoint after the step that is being made, and leave with exit code 75:
# go on with --resume auto. The second one leaves at once. SIGUSR1 saves and goes on. No process is left behind, also
# where the launcher or this script is killed. --restart K starts a run that ended by a fault again from its newest
# checkpoint, at most K times.
# Exit codes: 0 finished, 2 a mistake in what was given, 75 stopped after saving, 76 stopped by the health guard,
# 128+n by a second signal, else 1.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec python "$megaresid_root/launch/supervise.py" "$@"
