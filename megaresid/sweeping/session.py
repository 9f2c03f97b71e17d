"""A planned sweep, carried out: what has to be measured, what is left to run, and how it went."""

import sys
from collections.abc import Sequence

from megaresid import exit_codes
from megaresid.errors import UserError
from megaresid.sweeping.axes import parse_budget
from megaresid.sweeping.calibration import jobs_of, step_seconds, with_steps
from megaresid.sweeping.folder import Folder, Run, Sweep
from megaresid.sweeping.process import slots
from megaresid.sweeping.progress import Progress, State
from megaresid.sweeping.running import Runner, Signals, job_of, waiting_state
from megaresid.sweeping.sharing import Sharing, read_initial


def carry_out(
    folder: Folder, sweep: Sweep, lines: Sequence[str], places: list[dict[str, str]], signals: Signals
) -> int:
    """All runs that have not finished, one at a time in each of ``places``; the sweep's exit code."""
    with_gpus, threads = "CUDA_VISIBLE_DEVICES" in places[0], places[0].get("OMP_NUM_THREADS")
    each = f"{sweep.num_accelerators} {'GPU' if with_gpus else f'rank of {threads} threads'} each"
    print(f"sweep     {len(sweep.runs)} runs in {folder.path}, {len(places)} at a time, {each}")
    for line in lines:
        print(f"budget    {line}", flush=True)
    sweep, stopped = measured(folder, sweep, sweep.runs, places, signals)
    if stopped is not None:
        return _say_stopped(stopped)
    states = {run.name: waiting_state(folder, run) for run in sweep.runs}
    failures = {name: folder.outcome(name)[1] for name, state in states.items() if state.status == "failed"}
    for run in sweep.runs:
        if run.steps is None:
            states[run.name].status = "failed"
            failures[run.name] = f"not started, for the time of a step of {run.variant} could not be measured"
    sharing = Sharing()
    failures |= _compared_before(folder, sweep, sharing, {name for name, s in states.items() if s.status != "waiting"})
    jobs = [job_of(folder, run, states[run.name]) for run in sweep.runs if states[run.name].status == "waiting"]
    with Progress(list(states.values()), len(places)) as progress:
        for name, state in states.items():
            if state.status == "finished":
                progress.say(f"skipped   {name}, which has finished")
        runner = Runner(folder, sweep.num_accelerators, places, progress, sharing)
        runner.carry_out(jobs, signals)
    for line in sharing.declared.values():
        print(f"start     {line}")
    if runner.stopped is not None:
        return _say_stopped(runner.stopped)
    return _say_ended(states, failures | runner.failures)


def carry_out_one(folder: Folder, sweep: Sweep, index: int) -> int:
    """One run, on all that this machine has, as a task of a job array does; its exit code."""
    places, signals = slots(1, sweep.num_accelerators), Signals()
    with signals.listening():
        sweep, stopped = measured(folder, sweep, sweep.runs[index : index + 1], places, signals)
        run = sweep.runs[index]
        if stopped is not None:
            return stopped
        if run.steps is None:
            return exit_codes.FAULT  # it has been told why
        state = waiting_state(folder, run)
        if state.status == "finished":
            print(f"skipped   {run.name}, which has finished")
            return exit_codes.FINISHED
        if state.status == "failed":
            print(f"failed    {run.name}: {folder.outcome(run.name)[1]}", file=sys.stderr)
            return exit_codes.UNHEALTHY
        sharing = Sharing()
        _compared_before(folder, sweep, sharing, {other.name for other in sweep.runs} - {run.name})
        with Progress([state], 1) as progress:
            runner = Runner(folder, sweep.num_accelerators, places, progress, sharing)
            runner.carry_out([job_of(folder, run, state)], signals)
    if runner.stopped is not None:
        return runner.stopped
    return runner.codes.get(run.name) or (exit_codes.FAULT if runner.failures else exit_codes.FINISHED)


def measured(
    folder: Folder, sweep: Sweep, runs: Sequence[Run], places: list[dict[str, str]], signals: Signals
) -> tuple[Sweep, int | None]:
    """The sweep with the steps of these runs where they can be measured, and the exit code where it was stopped."""
    if all(run.steps is not None for run in runs):
        return sweep, None
    with folder.measuring(given_up=lambda: bool(signals.received)) as is_my_turn:
        if not is_my_turn:
            return sweep, exit_codes.STOPPED
        # Another task of a job array may have measured meanwhile.
        sweep = folder.read() or sweep
        jobs = jobs_of(folder, sweep, {run.variant for run in runs})
        with Progress([job.state for job in jobs], len(places)) as progress:
            runner = Runner(folder, sweep.num_accelerators, places, progress, None)
            runner.carry_out(jobs, signals)
        found = {job.run.variant: step_seconds(job) for job in jobs if job.state.status == "finished"}
        sweep = with_steps(sweep, found, parse_budget(sweep.budget))
        folder.write(sweep)
    for variant, seconds in found.items():
        steps = next(run.steps for run in sweep.runs if run.variant == variant)
        print(f"measured  {variant}: {seconds:.4g} s a step, {steps:,} steps", flush=True)
    return sweep, runner.stopped


def _compared_before(folder: Folder, sweep: Sweep, sharing: Sharing, names: set[str]) -> dict[str, str]:
    """Hold the starts of runs that are not to be started against each other; a line for each that differs."""
    failures = {}
    for run in sweep.runs:
        if run.name in names:
            try:
                if (initial := read_initial(folder.run(run.name))) is not None:
                    sharing.add(run.name, run.variant, run.seed, initial)
            except UserError as error:
                failures[run.name] = str(error)
    return failures


def _say_stopped(code: int) -> int:
    print("stopped   the same command goes on with what is left", flush=True)
    return code


def _say_ended(states: dict[str, State], failures: dict[str, str]) -> int:
    finished = sum(state.status == "finished" and name not in failures for name, state in states.items())
    print(f"ended     {finished} of {len(states)} runs have finished", flush=True)
    for name, line in failures.items():
        print(f"failed    {name}: {line}", file=sys.stderr)
    return exit_codes.FAULT if failures else exit_codes.FINISHED
