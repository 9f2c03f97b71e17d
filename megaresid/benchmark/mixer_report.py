"""What was measured of mixers by length: as rows, as tables, as a picture."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 160  # of a table that goes to a file
TITLES = {"core": "attention and the recurrences", "mixer": "whole mixers, with their projections"}


class Times(NamedTuple):
    """Seconds of a forward pass, and of it with its backward pass."""

    forward: float
    both: float


def summarise(found: Mapping[tuple[str, str], Mapping[int, list[Times]]], reference: str) -> list[dict[str, Any]]:
    """A row for each (group, name): medians over the rounds by length, how they grow, and from which length on forward
    and backward take less than the group's ``reference`` (at that length and all longer ones; None for nowhere)."""
    middle = {
        entry: {length: Times(*(median(column) for column in zip(*rounds))) for length, rounds in by_length.items()}
        for entry, by_length in found.items()
    }
    rows = []
    for (group, name), times in middle.items():
        ahead = None
        for length in sorted(times, reverse=True):
            if times[length].both >= middle[group, reference][length].both:
                break
            ahead = length
        rows.append(
            {
                "group": group,
                "name": name,
                "seconds": {length: t._asdict() for length, t in times.items()},
                "growth": growth({length: t.both for length, t in times.items()}),
                "ahead_from": ahead,
                "rounds": {length: [t._asdict() for t in rounds] for length, rounds in found[group, name].items()},
            }
        )
    return rows


def growth(seconds: Mapping[int, float]) -> float | None:
    """The exponent p of time ~ T^p between the two longest texts; None of one alone."""
    if len(seconds) < 2:
        return None
    shorter, longer = sorted(seconds)[-2:]
    return math.log(seconds[longer] / seconds[shorter]) / math.log(longer / shorter)


def print_tables(rows: list[dict[str, Any]]) -> None:
    """One table a group, one line an entry; in Markdown where the output is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    for group in dict.fromkeys(row["group"] for row in rows):
        chosen = [row for row in rows if row["group"] == group]
        table = Table(box=HEAVY_HEAD if console.is_terminal else MARKDOWN)
        table.add_column(TITLES[group], overflow="fold")
        for title in (*map(str, chosen[0]["seconds"]), "growth", "ahead from"):
            table.add_column(title, justify="right")
        for row in chosen:
            cells = [f"{1e3 * t['forward']:,.1f} / {1e3 * t['both']:,.1f}" for t in row["seconds"].values()]
            exponent = "n/a" if row["growth"] is None else f"T^{row['growth']:.2f}"
            table.add_row(row["name"], *cells, exponent, str(row["ahead_from"] or "-"))
        console.print(table)
    console.print(
        "CPU ms of forward / forward and backward by tokens, medians of the rounds; growth: of both, between the two "
        "longest texts; ahead from: the length from which on both take less than softmax's",
        soft_wrap=True,
    )


def draw(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    """Forward and backward by length, both logarithmic, one panel a group."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # takes a second, and not every run draws

    groups = list(dict.fromkeys(row["group"] for row in rows))
    figure = Figure(figsize=(7 * len(groups), 6), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        chosen = [row for row in rows if row["group"] == group]
        lengths = list(chosen[0]["seconds"])
        for index, row in enumerate(chosen):
            times = [1e3 * t["both"] for t in row["seconds"].values()]
            line = {"color": "black", "linewidth": 2.5} if index == 0 else {"color": colormaps["tab20"](index % 20)}
            axes.loglog(lengths, times, marker="o", markersize=3, label=row["name"], **line)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set(title=TITLES[group], xlabel="tokens", ylabel="forward and backward, CPU ms")
        axes.legend(fontsize="x-small")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(file, dpi=150)
