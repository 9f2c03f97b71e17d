#!/usr/bin/env bash
# A whole comparison on a CPU of two cores, in at most 40 minutes: the documentation in Python's standard library, a
# tiny model, vanilla beside two published variants and two controls (vanilla under another name, and a variant that
# is bad on purpose), two learning rates, three seeds; then the report. Takes no arguments. Started again, it goes on
# where it was stopped.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$megaresid_root"

# A run is 100 steps of .8 s on one core; with its start and its five evaluations 105 s, and two of 30 run at a time.
tokens=102400
variants=vanilla,attention_residuals,hyper_connections
variants=$variants,megaresid.compare.controls:VanillaAgain,megaresid.compare.controls:BrokenIdentity
sweep=sweeps/compare-example

source "$megaresid_root/launch/python_docs.sh"

say "Training"
# One thread a run: sums are then in the same order for each, and two runs keep their speed beside each other.
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
code=0
python -m megaresid.sweep --residual "$variants" --seeds 3 --learning-rates 1e-3,2e-3 --budget "tokens=$tokens" \
    --jobs 2 --out "$sweep" --data "$data" --deepspeed_config ds_configs/cpu.json \
    --model tiny --global-batch-size 4 --micro-batch-size 4 \
    --log-interval 20 --eval validation@25 --validation-tokens 10240 --checkpoint-interval 0 || code=$?
# Runs that failed are in the report.
if [ "$code" -gt 1 ]; then exit "$code"; fi

say "Comparing"
python -m megaresid.compare "$sweep" --baseline vanilla --out "$sweep/report"
say "Done"
exit "$code"
