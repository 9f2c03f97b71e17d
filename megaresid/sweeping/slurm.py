"""A sweep as a Slurm job array: one task a run."""

import shlex
import sys
from itertools import groupby
from pathlib import Path

from megaresid.errors import UserError
from megaresid.sweeping.folder import Folder, Sweep

SCRIPT = """\
#!/usr/bin/env bash
# One task of the array is one run of the sweep; all machines must see its folder, the data and this checkout.
# Five minutes before the time limit a run saves, leaves, and its task is put back into the queue. What has failed or
# was left is run by a new array: the command of the sweep prints one of the runs that have not finished.
#SBATCH --job-name=sweep
#SBATCH --array={array}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={ranks}
#SBATCH --cpus-per-task={cores}
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir={folder}
#SBATCH --output={log}

# The warning comes to this shell alone: a job that its owner cancels must not come back.
out_of_time= run= told=
stop_in_time() {{
    out_of_time=yes
    if [ -n "$run" ] && [ -z "$told" ]; then
        told=yes # a second one would have the run leave without saving
        kill -TERM "$run" || true
    fi
}}
trap stop_in_time USR1

{python} -m megaresid.sweep --out {out} --only "$SLURM_ARRAY_TASK_ID" &
run=$!
if [ -n "$out_of_time" ]; then stop_in_time; fi # the warning came before there was a run

# A wait that the trap interrupts returns at once, with what says so.
code=138
while [ "$code" = 138 ]; do
    code=0
    wait "$run" || code=$?
done
if [ "$out_of_time$code" = yes75 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
"""

CORES = 8
"""Of a task, for each of its GPUs."""


def job_array(folder: Folder, sweep: Sweep, at_once: int | None) -> str:
    """The script of an array of the runs that have not finished, at most ``at_once`` at a time. Raises UserError
    where all have."""
    left = [number for number, run in enumerate(sweep.runs, 1) if not folder.is_finished(run)]
    if not left:
        raise UserError(f"--slurm: all runs in {folder.path} have finished")
    (folder.path / "logs").mkdir(exist_ok=True)
    return SCRIPT.format(
        array=ranges(left) + (f"%{at_once}" if at_once else ""),
        ranks=sweep.num_accelerators,
        cores=CORES * sweep.num_accelerators,
        folder=shlex.quote(str(Path.cwd())),
        log=shlex.quote(f"{folder.path}/logs/task-%A_%a.log"),
        python=shlex.quote(sys.executable),
        out=shlex.quote(str(folder.path)),
    )


def ranges(numbers: list[int]) -> str:
    """``1-3,7`` for 1, 2, 3, 7."""
    texts = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        texts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(texts)
