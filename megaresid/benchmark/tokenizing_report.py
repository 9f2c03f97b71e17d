"""What was measured of tokenizing: as rows, as a table, as a picture."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table

from megaresid.benchmark.ratios import paired_ratio
from megaresid.benchmark.tokenizing_ways import Measurement

PLAIN_WIDTH = 160  # of a table that goes to a file
RAW = ("raw tiktoken, lists", "raw tiktoken, arrays")
LLMC = "llm.c"


def summarise(found: Mapping[tuple[str, int], list[Measurement]], size: int) -> list[dict[str, Any]]:
    """A row for each way and number of workers: MB of text a second, the median of the rounds, and the ratio of its
    speed, round by round, to raw tiktoken's (the faster of the two ways to call it) and to llm.c's."""
    rows = []
    for (way, workers), measured in found.items():
        seconds = [one.seconds for one in measured]
        raw = [min(both) for both in zip(*([one.seconds for one in found[name, workers]] for name in RAW))]
        llmc = [one.seconds for one in found[LLMC, workers]]
        rows.append(
            {
                "way": way,
                "workers": workers,
                "megabytes_per_second": median(size / 1e6 / one for one in seconds),
                "tokens": measured[0].tokens,
                "seconds": seconds,
                # Of speeds: the other's seconds to these.
                "of_raw_tiktoken": paired_ratio(raw, seconds)._asdict(),
                "of_llmc": paired_ratio(llmc, seconds)._asdict(),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a way, one group of columns a number of workers; in Markdown where the output is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    table = Table(box=HEAVY_HEAD if console.is_terminal else MARKDOWN)
    for title in ("way", "workers", "MB/s", "of raw tiktoken", "of llm.c's"):
        table.add_column(title, justify="left" if title == "way" else "right")
    for row in rows:
        ratios = (row["of_raw_tiktoken"], row["of_llmc"])
        cells = [f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" for ratio in ratios]
        table.add_row(row["way"], str(row["workers"]), f"{row['megabytes_per_second']:,.1f}", *cells)
    console.print(table)
    console.print(
        "MB of text a second, medians of the rounds; ratios of speeds, medians of the rounds and their spread; raw "
        "tiktoken: the faster of the two ways to call it in each round",
        soft_wrap=True,
    )


def draw(rows: list[dict[str, Any]], file: Path, title: str) -> None:
    """A bar a way, one panel a number of workers; the speed is logarithmic."""
    from matplotlib.figure import Figure  # takes a second, and not every run draws

    numbers = list(dict.fromkeys(row["workers"] for row in rows))
    figure = Figure(figsize=(7 * len(numbers), 4), layout="constrained")
    for axes, workers in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        chosen = [row for row in rows if row["workers"] == workers][::-1]
        speeds = [row["megabytes_per_second"] for row in chosen]
        colors = ["tab:blue" if row["way"].startswith("megaresid") else "tab:gray" for row in chosen]
        bars = axes.barh([row["way"] for row in chosen], speeds, color=colors)
        axes.bar_label(bars, [f"{speed:,.1f}" for speed in speeds], padding=3)
        axes.set(xscale="log", xlabel="MB of text a second", title=f"{workers} worker(s)")
        axes.margins(x=0.15)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(file, dpi=150)
