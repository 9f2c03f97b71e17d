#!/usr/bin/env bash
# Runs the tests: bash launch/test.sh [--full] [pytest's own arguments, paths from the checkout's root]
# The quick tier without --full, everything with it. Fails when no test ran.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

tier=(-m "not full")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --full ]; then tier=(); else arguments+=("$argument"); fi
done

cd "$megaresid_root"
# Two at a time, each with rank processes of its own; a file's tests stay together, since they share what is costly.
# Of one thread each: on small tensors more of them only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n 2 --dist loadfile ${tier[@]+"${tier[@]}"} ${arguments[@]+"${arguments[@]}"}
