#!/usr/bin/env bash
# From nothing to a trained model: environment, data (the documentation in Python's standard library), training,
# a sample, a summary. Takes no arguments; uses every GPU where there is one, else the CPU.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$megaresid_root"

cpu_ranks=2 # two ranks of one thread keep their speed when others use the cores, one of two threads does not
cpu_steps=400
gpu_steps=800
sequences=4 # per optimizer step: at equal tokens 4 x 2e-3 ended .15 below 8 x 3e-3

run=runs/quickstart
number=1
while [ -e "$run" ]; do
    number=$((number + 1))
    run=runs/quickstart-$number
done

source "$megaresid_root/launch/python_docs.sh"

ranks=0
if has_gpu; then ranks=$(python -c 'import torch; print(torch.cuda.device_count())'); fi
if [ "$ranks" -gt 0 ]; then
    config=ds_configs/h200x2.json steps=$gpu_steps
    say "Training on $ranks GPU(s)"
else
    config=ds_configs/cpu.json steps=$cpu_steps ranks=$cpu_ranks
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    # A container's share of the processors, which nproc does not see.
    if read -r quota period 2>/dev/null </sys/fs/cgroup/cpu.max && [ "$quota" != max ]; then
        share=$(((quota + period - 1) / period))
        if [ "$cores" -gt "$share" ]; then cores=$share; fi
    fi
    if [ "$ranks" -gt "$cores" ]; then ranks=1; fi
    # Said, DeepSpeed does not search for an accelerator, and warn that there is none, in every process.
    export OMP_NUM_THREADS=$((cores / ranks)) DS_ACCELERATOR=cpu
    say "Training on the CPU: $ranks rank(s) of $OMP_NUM_THREADS thread(s)"
fi
micro_batch=$(((sequences + ranks - 1) / ranks))
# Another run on this machine may hold the launcher's usual port.
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

deepspeed --log_level error --num_accelerators "$ranks" --master_port "$port" --module megaresid.train \
    --deepspeed_config "$config" --data "$data" --run-dir "$run" --model tiny --steps "$steps" \
    --global-batch-size $((micro_batch * ranks)) --micro-batch-size "$micro_batch" \
    --learning-rate 2e-3 --min-learning-rate 1e-4 --weight-decay 0.1 \
    --log-interval 20 --eval "validation@$((steps / 4))" --validation-tokens 20480 \
    --checkpoint-interval $((steps / 2))

say "Sampling"
python -m megaresid.generate --run "$run" --prompt "This module provides" --seed 2
say "Summary"
python -m megaresid.summary --run "$run"
say "Done"
