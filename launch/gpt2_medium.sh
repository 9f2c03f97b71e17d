#!/usr/bin/env bash
# The reference run: GPT-2 Medium, 13,535 steps of 512 sequences of 1,024 tokens, on two H200s.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: bash launch/gpt2_medium.sh DATA RUN_DIR [options of megaresid.train]" >&2
    exit 2
fi
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=$1 run_dir=$2
shift 2

exec bash "$launch/train.sh" --num_accelerators 2 --module megaresid.train \
    --deepspeed_config "$launch/../ds_configs/h200x2.json" --preset reference --micro-batch-size 32 \
    --data "$data" --run-dir "$run_dir" "$@"
