"""Compare runs: ``python -m megaresid.compare sweeps/x --out report/``"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Column, Table

from megaresid.errors import UserError, exits_with_user_errors

if TYPE_CHECKING:
    from megaresid.compare.noise import Noise
    from megaresid.compare.results import Comparison, Difference, Estimate, Problem

WIDTH = 120  # where the output is not a terminal


def compare(
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional],
    baseline: str | None = None,
    out: Path = Path("report"),
    allow: str | None = None,
    noise: bool = False,
) -> None:
    """Is a variant better at the same cost, and can it be believed?

    Reads run directories alone. A variant is one model, whatever its seeds and learning rates; each stands at its best
    learning rate, and is compared with the baseline seed by seed. Writes report.html, report.md, report.json and the
    plots.

    Args:
        paths: Sweeps, run directories or folders of them.
        baseline: The variant to compare with, by the name that the report gives it or as --residual was written; by
            default vanilla.
        out: Where the report is written: a new folder, or one that holds an earlier report.
        allow: Why runs may be ranked although they differ in data, tokens, validation set or recipe, which is refused
            otherwise. The report prints the reason.
        noise: Print how far seeds alone move the loss, and how many seeds a given difference needs. Writes no report.
    """
    if not paths:
        raise UserError("there is nothing to compare: name a sweep, a run directory or a folder of runs")
    if allow is not None and not allow.strip():
        raise UserError("--allow is empty: give the reason why the runs may be ranked, in words")
    console = _console()
    if noise:
        from megaresid.compare.noise import estimate_noise

        _print_noise(console, estimate_noise(paths))
        return
    with _told(out):
        check_out(out)
    from megaresid.compare import comparison, report

    found = comparison.compare(paths, baseline, allow)
    with _told(out):
        report.write(found, out)
    _print(console, found)
    console.print(f"\nThe report is {out / 'report.html'}; report.md, report.json and the plots lie beside it.")


@contextmanager
def _told(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        mend = "choose another folder, or make room"
        raise UserError(f"--out {out} cannot be written: {error.strerror}: {mend}") from None


def check_out(out: Path) -> None:
    """Raises UserError where a report would overwrite what is not one."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if not any(out.iterdir()):
        return
    try:
        ours = "schema_version" in json.loads((out / "report.json").read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise UserError(f"--out {out} is in use and holds no report of this command: choose another folder")


def _console() -> Console:
    """It prints what it is given: no markup, no highlighting; colours on a terminal only."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, markup=False, soft_wrap=True, width=WIDTH)


def _table(first: str, *columns: str) -> Table:
    """Names are broken where there is no room, and not cut."""
    name = Column(first, overflow="fold")
    return Table(name, *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def _print(console: Console, found: "Comparison") -> None:
    _print_problems(console, found.problems)
    if found.refusal:
        console.print(found.refusal + "\n")
    if found.allowed:
        console.print(found.allowed + "\n")
    table = _table("variant", "rate", "seeds", "final loss", "to baseline", "p (Holm)", "could show", "", "step time")
    for variant in found.variants:
        difference = variant.difference
        table.add_row(
            variant.name,
            f"{variant.learning_rate:g}{' (edge)' if variant.at_edge else ''}",
            str(len(variant.loss.samples)),
            _estimate(variant.loss),
            _difference(difference),
            "" if difference is None or difference.p_holm is None else f"{difference.p_holm:.2g}",
            "" if difference is None or difference.detectable is None else f"{difference.detectable:.2g}",
            "baseline" if variant.name == found.baseline else difference.verdict if difference else "not compared",
            "-" if variant.cost.step_ratio is None else f"x{variant.cost.step_ratio:.2f}",
        )
    console.print(table)
    if found.orders:
        console.print(f"\n{found.orders.remark}")


def _print_problems(console: Console, problems: "tuple[Problem, ...]") -> None:
    for problem in problems:
        console.print(f"{problem.run}: {problem.line}")
    if problems:
        console.print()


def _estimate(found: "Estimate") -> str:
    return _loss(found.mean) + _half_width(found)


def _difference(found: "Difference | None") -> str:
    if found is None:
        return ""
    return ("+" if found.mean >= 0 else "") + _loss(found.mean) + _half_width(found)


def _half_width(found: "Estimate | Difference") -> str:
    return "" if found.low is None else f" ± {_loss((found.high - found.low) / 2)}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def _print_noise(console: Console, noise: "Noise") -> None:
    from megaresid.compare.noise import DIFFERENCES

    _print_problems(console, noise.problems)
    table = _table("variant", "rate", "seeds", "mean final loss", "deviation between seeds")
    for one in noise.variants:
        table.add_row(one.name, f"{one.learning_rate:g}", str(one.seeds), f"{one.mean:.4f}", f"{one.spread:.2g}")
    console.print(table)
    losses, differences = noise.of_losses, noise.of_differences
    console.print(
        f"\nFinal losses of one variant spread over seeds by {losses.value:.2g} nats (standard deviation, 95% interval "
        f"{losses.low:.2g} to {losses.high:.2g}, {losses.freedom} degrees of freedom)."
    )
    how = (
        "measured between these variants, paired by seed"
        if noise.paired
        else "taken to be sqrt(2) times that, as if seeds moved two variants independently"
    )
    console.print(f"Differences of two variants spread by {differences.value:.2g}, {how}.\n")
    table = _table("true difference", "seeds needed", "if the noise is as large as its interval allows")
    for difference in DIFFERENCES:
        table.add_row(f"{difference:g}", *map(_seeds, noise.needed(difference)))
    console.print(table)
    console.print("\nSeeds of each variant with which a paired t-test at 5% finds such a difference 4 times in 5.\n")
    table = _table("seeds", "difference that they show")
    for seeds in sorted({2, 3, 5, 10, *(one.seeds for one in noise.variants)}):
        table.add_row(str(seeds), f"{noise.shows(seeds):.2g}")
    console.print(table)


def _seeds(count: int | None) -> str:
    from megaresid.compare.statistics import MOST_SEEDS

    return f"more than {MOST_SEEDS:,}" if count is None else f"{count:,}"


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    tyro.cli(compare, prog="python -m megaresid.compare", args=sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
