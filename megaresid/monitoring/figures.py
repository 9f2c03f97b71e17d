"""Figures of what a probe has found, by matplotlib without a screen."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from megaresid.monitoring.findings import CLOSE, DepthMatrix, Findings, MixingMatrices

STYLES = {
    "attention": ("#0072B2", "o", "-"),
    "mlp": ("#E69F00", "s", "--"),
    "parallel": ("#009E73", "^", "-"),
    "both": ("#009E73", "v", "-"),
    "": ("#000000", "D", ":"),
}
"""Of the kinds of a site, and of a layer: colours that the colour-blind can tell apart (Okabe and Ito 2008)."""

LABELS = {
    "read_rms": "RMS of what a site reads",
    "update_rms": "RMS of a site's update",
    "update_ratio": "update / read",
    "cosine": "cosine to the next layer",
    "gradient_norm": "norm of the gradient",
    "stream_spread": "spread of the streams",
}
LOGARITHMIC = ("read_rms", "update_rms", "update_ratio", "gradient_norm")
COMMON = tuple(LABELS)
COLUMNS = 3
PANEL = (4.0, 2.6)  # inches
MOST_TICKS = 24
FLAT = 1e-3
"""The least height of a panel, relative to what it shows."""


class PlainLog(LogFormatter):
    """0.0125 rather than 1.25 x 10^-2, at the ticks that have a label."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:.3g}" if super().__call__(x, pos) else ""


def figures(findings: Findings, title: str) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of all that there is to draw."""
    common = [name for name in COMMON if name in findings.by_depth]
    if common:
        yield "by_depth", _by_depth(findings, common, title)
    declared = [name for name in findings.by_depth if name not in COMMON and not _is_an_extreme(name, findings)]
    if declared:
        yield "by_depth_declared", _by_depth(findings, declared, title)
    if findings.streams:
        yield "streams", _streams(findings.streams, title)
    for name, matrix in findings.depth.items():
        yield name, _depth(name, matrix, title)
    for name, matrices in findings.mixing.items():
        yield name, _mixing(name, matrices, title)


def _is_an_extreme(name: str, findings: Findings) -> bool:
    return name.endswith(("_min", "_max")) and name[:-4] in findings.by_depth


def _by_depth(findings: Findings, quantities: Sequence[str], title: str) -> Figure:
    """A panel for each quantity, the depth to the right; of several values at a place their mean, least and largest."""
    columns = min(COLUMNS, len(quantities))
    rows = math.ceil(len(quantities) / columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.6), dpi=100, layout="constrained")
    figure.suptitle(title)
    for quantity, axes in zip(quantities, _grid(figure, rows, columns, len(quantities)), strict=True):
        _panel(axes, quantity, findings)
    return figure


def _grid(figure: Figure, rows: int, columns: int, count: int) -> list[Axes]:
    """The first ``count`` panels of a grid, and none behind them."""
    panels = [*figure.subplots(rows, columns, squeeze=False).flat]
    for panel in panels[count:]:
        panel.remove()
    return panels[:count]


def _panel(axes: Axes, quantity: str, findings: Findings) -> None:
    places = findings.by_depth[quantity]
    lows, highs = findings.by_depth.get(f"{quantity}_min", {}), findings.by_depth.get(f"{quantity}_max", {})
    kinds = list(dict.fromkeys(_kind(place) for place in places))
    layers = [_layer(place) for place in places if _layer(place) is not None]
    last = max(layers, default=-1) + 1
    positive, sites = all(value > 0 for value in places.values()), any(map(_kind, places))
    for kind in kinds:
        of_kind = [place for place in places if _kind(place) == kind]
        at = [_position(place, last) for place in of_kind]
        values = [places[place] for place in of_kind]
        colour, marker, line = STYLES.get(kind, STYLES[""])
        ranged = [place for place in of_kind if place in lows]
        axes.plot(at, values, color=colour, marker=marker, linestyle=line, markersize=4, label=kind or CLOSE)
        if ranged:
            axes.vlines(
                [_position(place, last) for place in ranged],
                [lows[place] for place in ranged],
                [highs[place] for place in ranged],
                color=colour,
                alpha=0.4,
            )
    logarithmic = quantity in LOGARITHMIC and positive
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(PlainLog())
        axes.yaxis.set_minor_formatter(PlainLog())
    axes.set_title(LABELS.get(quantity, quantity), fontsize="medium")
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if sites:
        axes.legend(fontsize="small")
    if not logarithmic:
        _show_no_rounding(axes)


def _show_no_rounding(axes: Axes) -> None:
    """Of numbers that are equal but for rounding, as the sums of a doubly stochastic matrix, show that they are."""
    low, high = axes.get_ylim()
    least = FLAT * max(abs(low), abs(high))
    if high - low < least:
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
        axes.ticklabel_format(axis="y", useOffset=False)


def _layer(place: str) -> int | None:
    number = place.split(".")[0]
    return int(number) if number.isdigit() else None


def _kind(place: str) -> str:
    return place.split(".")[1] if "." in place else ""


def _position(place: str, last: int) -> float:
    """On the axis of layers, an MLP half a layer behind its attention; the embedding before, the close behind."""
    layer = _layer(place)
    if layer is None:
        return last if place in (CLOSE, "head") else last + 1 if place == "shared" else -1
    return layer + 0.5 * (_kind(place) == "mlp")


def _streams(streams: dict[str, list[float]], title: str) -> Figure:
    width = max(len(row) for row in streams.values())
    values = np.array([row + [math.nan] * (width - len(row)) for row in streams.values()])
    figure, axes = _heat_map_figure(values.shape, title)
    _heat_map(figure, axes, values, list(streams), [str(n) for n in range(width)], "RMS")
    axes.set(xlabel="stream", ylabel="before the site", title="RMS of the streams")
    return figure


def _depth(name: str, matrix: DepthMatrix, title: str) -> Figure:
    values = matrix.array()
    figure, axes = _heat_map_figure(values.shape, title)
    _heat_map(figure, axes, values, list(matrix.weights), matrix.sources, "weight, mean over tokens")
    axes.set(xlabel="source", ylabel="site that reads", title=f"{name}: what each site takes of each source")
    return figure


def _heat_map_figure(shape: tuple[int, ...], title: str) -> tuple[Figure, Axes]:
    rows, columns = shape
    size = (min(10.0, 3.2 + 0.28 * columns), min(10.0, 2.4 + 0.22 * rows))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure, figure.subplots()


def _heat_map(
    figure: Figure, axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], unit: str
) -> None:
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **_colours([values]))
    axes.set_yticks(*_ticks(rows), fontsize="x-small")
    axes.set_xticks(*_ticks(columns), fontsize="x-small", rotation=90)
    figure.colorbar(image, ax=axes, label=unit)


def _colours(matrices: Sequence[np.ndarray]) -> dict:
    """One scale for all of them, from zero, or around it where there are negative values."""
    most = max(np.nanmax(np.abs(matrix)) for matrix in matrices)
    if min(np.nanmin(matrix) for matrix in matrices) < 0:
        return {"cmap": "PuOr", "vmin": -most, "vmax": most}
    return {"cmap": "cividis", "vmin": 0.0, "vmax": most}


def _ticks(names: Sequence[str]) -> tuple[range, list[str]]:
    """Positions and labels, as many as can be read."""
    every = range(0, len(names), math.ceil(len(names) / MOST_TICKS))
    return every, [names[position] for position in every]


def _mixing(name: str, matrices: MixingMatrices, title: str) -> Figure:
    """A small heat map for each place, and one for the product of all, with the sums of rows and columns."""
    panels = dict(matrices.by_place)
    if matrices.composite is not None:
        panels["product of all"] = matrices.composite
    columns = min(8, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.5 * columns + 1.2, 1.75 * rows + 1.0), dpi=100, layout="constrained")
    figure.suptitle(f"{title}\n{name}, mean over tokens: from streams (columns, sums below) to streams (rows)")
    axes = _grid(figure, rows, columns, len(panels))
    image, colours = None, _colours([*panels.values()])
    for (place, matrix), panel in zip(panels.items(), axes, strict=True):
        image = panel.imshow(matrix, interpolation="nearest", **colours)
        panel.set_title(place, fontsize="x-small")
        numbers = range(len(matrix))
        panel.set_xticks(numbers, [f"{total:.2g}" for total in matrix.sum(0)], fontsize="xx-small", rotation=90)
        panel.set_yticks(numbers, [f"{total:.2g}" for total in matrix.sum(1)], fontsize="xx-small")
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
    return figure
