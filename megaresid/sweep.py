"""Train every combination of variants, learning rates and seeds at one budget.

    python -m megaresid.sweep --residual "vanilla,hyper_connections(streams=2)" --attention softmax --seeds 3 \\
        --learning-rates 1e-4,3e-4,1e-3 --budget flops=1e17 --out sweeps/x --data DIR ...

All other options are those of python -m megaresid.train, the same for every run; without --deepspeed_config they have
that of the quickstart, ds_configs/cpu.json or with GPUs h200x2.json. All runs are checked before the first is started.
The same command again skips runs that have finished and goes on with those that were stopped; with more on an axis it
adds runs. A run that fails is told of, and the sweep goes on.

Exit code 0: all have finished; 1: some failed; 2: a mistake in the options; 75: stopped by a signal, the runs saved.
"""

import argparse
import sys
from pathlib import Path

from megaresid import exit_codes
from megaresid.accelerator import choose_accelerator
from megaresid.errors import UserError, exits_with_user_errors
from megaresid.sweeping.axes import parse_budget, parse_rates, parse_seeds

OURS = {
    "--run-dir": "it is in the folder of --out",
    "--resume": "the same command goes on by itself",
    "--steps": "they follow from --budget",
    "--seed": "give --seeds",
    "--learning-rate": "give --learning-rates",
    "--dry-run": "give it to megaresid.train",
    "--allow-other": "the runs of a sweep share what it would allow",
}
"""Options of ``megaresid.train`` that are set here, each run's own."""
PLANNING = ("residual", "attention", "seeds", "learning_rates", "budget", "jobs", "num_accelerators", "slurm")


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    chosen, rest = _options(sys.argv[1:] if arguments is None else arguments)
    choose_accelerator()
    sys.exit(_sweep(chosen, rest) if chosen.only is None else _only(chosen, rest))


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m megaresid.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--residual", metavar="SPECS", help="residual variants, or patterns of them over the depth, with commas")
    add("--attention", metavar="SPECS", help="the same of mixers; every residual is run with every mixer")
    add("--seeds", metavar="N|A,B", help="how many seeds (3: 1, 2 and 3), or the seeds themselves (one: 7,); default 3")
    add("--learning-rates", "--learning_rates", metavar="A,B", help="peaks; each ends at a tenth of it, "
        "unless --min-learning-rate is given; by default the one of --learning-rate")  # fmt: skip
    add("--budget", metavar="UNIT=N", help="of each run: tokens=1e8, flops=1e17 or seconds=600 of training, for which "
        "the time of a step of each variant is measured first")  # fmt: skip
    add("--out", type=Path, metavar="DIR", required=True, help="the folder of the sweep: new, or that of this sweep")
    add("--jobs", type=int, metavar="N", help="runs at a time, each with GPUs or threads of its own; default 1")
    add("--num-accelerators", "--num_accelerators", type=int, metavar="N", help="ranks of each run; by default its "
        "share of the GPUs, or 1 on a CPU")  # fmt: skip
    add("--slurm", action="store_true", help="run nothing, and print a Slurm job array that does")
    add("--only", type=int, metavar="K", help="of a sweep that has been planned, the K-th run alone (from 1)")
    chosen, rest = parser.parse_known_args(arguments)
    rest = [argument for argument in rest if argument != "--"]
    for argument in rest:
        if (name := argument.split("=")[0].replace("_", "-")) in OURS:
            raise UserError(f"{name}: a sweep sets it for each run: {OURS[name]}")
    for name in ("jobs", "num_accelerators"):
        if (value := getattr(chosen, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    return chosen, rest


def _sweep(chosen: argparse.Namespace, rest: list[str]) -> int:
    if chosen.budget is None:
        raise UserError("--budget is missing: give tokens=NUMBER, flops=NUMBER or seconds=NUMBER")
    budget, seeds = parse_budget(chosen.budget), parse_seeds(chosen.seeds or "3")
    rates = parse_rates(chosen.learning_rates) if chosen.learning_rates else None
    # After the options are parsed: --help must not wait for these imports.
    from megaresid.sweeping.folder import Folder, merged
    from megaresid.sweeping.plan import Wanted, plan
    from megaresid.sweeping.process import slots, visible_devices
    from megaresid.sweeping.running import Signals
    from megaresid.sweeping.session import carry_out
    from megaresid.sweeping.slurm import job_array

    jobs = chosen.jobs or 1
    devices = visible_devices()
    ranks = chosen.num_accelerators or max(1, len(devices) // jobs)
    rest = _with_deepspeed_config(rest, "h200x2.json" if devices else "cpu.json")
    places = [] if chosen.slurm else slots(jobs, ranks)
    folder = Folder(chosen.out.resolve())
    before = folder.read()
    wanted = Wanted(chosen.residual, chosen.attention, seeds, rates, budget, ranks, folder.path, rest)
    signals = Signals()
    with signals.listening():
        sweep, lines = plan(wanted)
        sweep = sweep if before is None else merged(before, sweep, chosen.out)
        if signals.received:
            return exit_codes.STOPPED
        with folder.locked():
            folder.write(sweep)
            if chosen.slurm:
                print(job_array(folder, sweep, chosen.jobs), end="")
                return exit_codes.FINISHED
            return carry_out(folder, sweep, lines, places, signals)


def _with_deepspeed_config(rest: list[str], name: str) -> list[str]:
    """The options of training with one of the checkout's DeepSpeed configurations, where they name none."""
    named = {argument.split("=")[0].replace("_", "-") for argument in rest}
    if named & {"--deepspeed-config", "--config"}:
        return rest
    return [*rest, "--deepspeed-config", str(Path(__file__).parents[1] / "ds_configs" / name)]


def _only(chosen: argparse.Namespace, rest: list[str]) -> int:
    if given := [f"--{name.replace('_', '-')}" for name in PLANNING if getattr(chosen, name)] + rest:
        raise UserError(f"{given[0]}: --only takes everything from the sweep that --out names: leave it out")
    from megaresid.sweeping.folder import Folder
    from megaresid.sweeping.session import carry_out_one

    folder = Folder(chosen.out.resolve())
    sweep = folder.read()
    if sweep is None:
        raise UserError(f"--out {chosen.out}: there is no sweep: plan it by the whole command with --slurm")
    if not 1 <= chosen.only <= len(sweep.runs):
        raise UserError(f"--only {chosen.only}: the sweep has runs 1 to {len(sweep.runs)}")
    return carry_out_one(folder, sweep, chosen.only - 1)


if __name__ == "__main__":
    main()
