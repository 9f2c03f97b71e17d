"""The plots of a report, in colours that the colour-blind tell apart; line styles and markers differ too."""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megaresid.compare.results import Comparison, Curve, Difference, Point, Variant
from megaresid.compare.units import FLOPS, TIME, TOKENS, Unit, fixed, rate, significant, unit_for
from megaresid.compare.wording import half_width, in_order

BASELINE = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, without their yellow, which is hard to see on white."""
MARKERS = "os^DvPX<>*ph"
DASHES = ("-", (0, (5, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1, 1)), (0, (7, 1.5, 1, 1.5, 1, 1.5)))
WIDTH = 5.6  # inches: text of 9 points is legible on a phone and in half a wide window
SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,  # a dollar in a variant's name is a dollar
    "svg.hashsalt": "megaresid",  # the same drawing, the same file
    "svg.fonttype": "path",
}
LOSS = "validation loss (nats per token)"
SHOWN_FROM = 0.25
"""The part of the baseline's training after which its loss is on the axis."""
FAR = 4.0
NEAR = 0.05  # nats: what is so near to the best is always on the axis
"""A value so many times as far from the best as the median is, is left beyond the axis."""
NAME = 60  # characters of a name that are drawn


@dataclass(frozen=True)
class Drawing:
    """``alt`` says in words what the picture shows."""

    name: str
    figure: Figure
    caption: str
    alt: str


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    dashes: str | tuple

    def line(self) -> dict:
        return {"color": self.colour, "linestyle": self.dashes, "linewidth": 1.6}

    def point(self) -> dict:
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
        return {"color": self.colour, "marker": self.marker, "markersize": 6.5, **edge}


def draw(comparison: Comparison) -> list[Drawing]:
    """All the plots that there is something to draw for. Where no variant is ranked, none that ranks them."""
    with matplotlib.rc_context(SETTINGS):
        drawings = [
            _differences(comparison),
            _curves(comparison, "tokens", "tokens", TOKENS),
            _gaps(comparison),
            _curves(comparison, "flops", "FLOPs", FLOPS),
            _curves(comparison, "seconds", "time", TIME),
            _rates(comparison),
            _against_cost(comparison, "step_time", "step time", TIME, lambda v: v.cost.step_seconds.mean),
            _against_cost(comparison, "flops_per_token", "FLOPs per token", FLOPS, lambda v: v.cost.flops_per_token),
        ]
    return [drawing for drawing in drawings if drawing is not None]


def as_svg(figure: Figure) -> str:
    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def as_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(file, format="png", dpi=160)
    return file.getvalue()


def styles(variants: Sequence[Variant]) -> dict[str, Style]:
    """One a variant, the same in every plot: black for the first, and twelve that differ in marker, more in all."""
    return {
        variant.name: Style(
            COLOURS[(i - 1) % len(COLOURS)] if i else BASELINE, MARKERS[i % len(MARKERS)], DASHES[i % len(DASHES)]
        )
        for i, variant in enumerate(variants)
    }


def drawn_name(name: str) -> str:
    """A name as it can be drawn: printable, and its middle left out where it is long."""
    name = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
    if len(name) <= NAME:
        return name
    half = (NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


Row = tuple[float, float, float, float]
"""On a line with a band: x, the mean, the lowest and the highest."""


def over_seeds(curves: Iterable[Curve], what: str) -> list[Row]:
    """Of every step at which all curves have a finite loss: the mean of ``what``; the loss's mean, lowest, highest."""
    curves = [curve for curve in curves if curve.points]
    by_step: dict[int, list[Point]] = defaultdict(list)
    for curve in curves:
        for point in {point.step: point for point in curve.points}.values():
            if math.isfinite(point.loss):
                by_step[point.step].append(point)
    rows = []
    for _, points in sorted(by_step.items()):
        if len(points) == len(curves):
            losses = [point.loss for point in points]
            x = sum(getattr(point, what) for point in points) / len(points)
            rows.append((x, sum(losses) / len(losses), min(losses), max(losses)))
    return rows


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Those (cost, loss) for which no other has less of one and not more of the other, from the cheapest on."""
    front, best = [], math.inf
    by_cost = sorted(points, key=lambda name: points[name])
    for name in by_cost:
        if points[name][1] < best or (front and points[name] == points[front[-1]]):
            front.append(name)
            best = points[name][1]
    return front


def reach(values: Iterable[float]) -> float:
    """Where an axis that starts at the smallest value ends: a value may be so far off that the others would lie on
    each other."""
    finite = sorted(value for value in values if math.isfinite(value))
    smallest, median = finite[0], finite[len(finite) // 2]
    near = smallest + max(FAR * (median - smallest), NEAR)
    return max(value for value in finite if value <= near)


def _figure(
    variants: Sequence[Variant], style: Mapping[str, Style], far: Container[str] = (), lines: bool = True
) -> tuple[Figure, Axes]:
    """With the legend, of lines or of points, below the axes, where it covers nothing."""
    names = [drawn_name(v.name) + (" (beyond the axis)" if v.name in far else "") for v in variants]
    columns = max(1, min(4, 80 // (max(map(len, names)) + 8)))
    figure = Figure(figsize=(WIDTH, 3.8 + 0.21 * math.ceil(len(names) / columns)), layout="constrained")
    looks = [style[variant.name] for variant in variants]
    handles = [Line2D([], [], **((look.line() if lines else {"linestyle": ""}) | look.point())) for look in looks]
    length = 3.5 if lines else 1
    figure.legend(handles, names, loc="outside lower left", ncols=columns, frameon=False, handlelength=length)
    return figure, figure.subplots()


def _band(axes: Axes, rows: Sequence[Row], factor: float, style: Style, name: str) -> None:
    x = [row[0] / factor for row in rows]
    marked = max(1, len(rows) // 8)
    line = {**style.line(), **style.point(), "markersize": 5, "markevery": marked}
    axes.plot(x, [row[1] for row in rows], label=name, **line)
    axes.fill_between(x, [row[2] for row in rows], [row[3] for row in rows], color=style.colour, alpha=0.15, lw=0)


def _ends(lines: Mapping[str, Sequence[Row]]) -> str:
    return ", ".join(f"{name} {fixed(rows[-1][1])}" for name, rows in lines.items())


def _beyond(far: Mapping[str, float], signed: bool = False) -> str:
    if not far:
        return ""
    return " Beyond the axis: " + ", ".join(f"{name} ({fixed(x, signed=signed)})" for name, x in far.items()) + "."


def _curves(comparison: Comparison, what: str, name: str, units: tuple[Unit, ...]) -> Drawing | None:
    lines = {variant.name: over_seeds(variant.curves, what) for variant in in_order(comparison)}
    lines = {variant: rows for variant, rows in lines.items() if rows}
    if not lines:
        return None
    shown = [variant for variant in in_order(comparison) if variant.name in lines]
    reference = lines.get(comparison.baseline, next(iter(lines.values())))
    top = next((row[1] for row in reference if row[0] >= SHOWN_FROM * reference[-1][0]), reference[-1][1])
    low = min(row[2] for rows in lines.values() for row in rows)
    high = max(top, reference[-1][3])
    far = {variant: rows[-1][1] for variant, rows in lines.items() if rows[-1][1] > high}
    style = styles(in_order(comparison))
    figure, axes = _figure(shown, style, far)
    unit = unit_for([row[0] for rows in lines.values() for row in rows], units)
    for variant, rows in lines.items():
        _band(axes, rows, unit.factor, style[variant], variant)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{name} of training ({unit.name})" if units is not TOKENS else f"{unit.name} of training")
    axes.set_ylabel(LOSS)
    caption = (
        f"Validation loss over {name}: mean of the seeds, and a band from the lowest to the highest. "
        f"Losses above {fixed(high)}, of the start of training, are not shown.{_beyond(far)}"
    )
    alt = f"Curves of validation loss over {name}. They end at: {_ends(lines)}"
    return Drawing(f"loss_over_{what}", figure, caption, alt)


def paired(curves: Iterable[Curve], baseline: Iterable[Curve]) -> list[Curve]:
    """Curves of a variant's loss minus the baseline's of the same seed, where both were measured at equal tokens."""
    by_seed = {curve.seed: {point.tokens: point.loss for point in curve.points} for curve in baseline}
    return [
        curve.model_copy(
            update={
                "points": tuple(
                    point.model_copy(update={"loss": point.loss - by_seed[curve.seed][point.tokens]})
                    for point in curve.points
                    if point.tokens in by_seed[curve.seed]
                )
            }
        )
        for curve in curves
        if curve.seed in by_seed
    ]


def _gaps(comparison: Comparison) -> Drawing | None:
    if comparison.refusal is not None:
        return None
    baseline = next((v for v in comparison.variants if v.name == comparison.baseline), None)
    others = [v for v in comparison.variants if v is not baseline]
    lines = {v.name: over_seeds(paired(v.curves, baseline.curves), "tokens") for v in others} if baseline else {}
    lines = {variant: rows for variant, rows in lines.items() if rows}
    if not lines:
        return None
    limit = reach([0.0, *(abs(rows[-1][1]) for rows in lines.values())])
    far = {variant: rows[-1][1] for variant, rows in lines.items() if abs(rows[-1][1]) > limit}
    style = styles(in_order(comparison))
    figure, axes = _figure([v for v in others if v.name in lines], style, far)
    unit = unit_for([row[0] for rows in lines.values() for row in rows], TOKENS)
    for variant, rows in lines.items():
        _band(axes, rows, unit.factor, style[variant], variant)
    late = [
        row[2:]
        for variant, rows in lines.items()
        for row in rows
        if variant not in far and row[0] >= SHOWN_FROM * rows[-1][0]
    ]
    low, high = min(0.0, *(row[0] for row in late)), max(0.0, *(row[1] for row in late))
    if high > low:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axes.axhline(0.0, color="black", linewidth=1)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{unit.name} of training")
    axes.set_ylabel("difference of validation loss\n(nats per token)")
    caption = (
        f"Validation loss minus that of {comparison.baseline} at the same step, paired by seed: mean of the seeds, and "
        "a band from the lowest to the highest. The axis fits what follows the first quarter of training."
        + _beyond(far, signed=True)
    )
    alt = f"Curves of the difference to {comparison.baseline} over tokens. They end at: {_ends(lines)}"
    return Drawing("difference_over_tokens", figure, caption, alt)


def _rates(comparison: Comparison) -> Drawing | None:
    """None where no variant has two learning rates."""
    lines = {}
    for variant in in_order(comparison):
        found = [(at.learning_rate, [s.value for s in at.loss.samples]) for at in variant.rates if at.loss is not None]
        rows = [(x, sum(y) / len(y), min(y), max(y)) for x, y in sorted(found) if all(map(math.isfinite, y))]
        if rows:
            lines[variant.name] = rows
    if comparison.refusal is not None or max(map(len, lines.values()), default=0) < 2:
        return None
    every = [row[1] for rows in lines.values() for row in rows]
    low, high = min(row[2] for rows in lines.values() for row in rows), reach(every)
    far = [variant for variant, rows in lines.items() if all(row[1] > high for row in rows)]
    style = styles(in_order(comparison))
    figure, axes = _figure([v for v in comparison.variants if v.name in lines], style, far)
    for variant, rows in lines.items():
        _band(axes, rows, 1.0, style[variant], variant)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    tried = sorted({row[0] for rows in lines.values() for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(tried, [rate(x) for x in tried])
    axes.minorticks_off()
    axes.set_xlabel("learning rate")
    axes.set_ylabel(LOSS)
    best = ", ".join(f"{v.name} {rate(v.learning_rate)}" for v in comparison.variants)
    over = sum(y > high for y in every)
    caption = (
        "Final validation loss by learning rate: mean of the seeds, and a band from the lowest to the highest."
        + (f" {over} of {len(every)} means lie above the axis." if over else "")
    )
    return Drawing("loss_over_rate", figure, caption, f"Final validation loss by learning rate. The best rates: {best}")


def _against_cost(
    comparison: Comparison, file: str, name: str, units: tuple[Unit, ...], cost: Callable[[Variant], float]
) -> Drawing | None:
    spent = {v.name: (cost(v), v.loss.mean) for v in comparison.variants if math.isfinite(v.loss.mean)}
    if comparison.refusal is not None or len(spent) < 2:
        return None
    variants = [v for v in comparison.variants if v.name in spent]
    style = styles(in_order(comparison))
    high = reach([y for _, y in spent.values()])
    far = {v: y for v, (_, y) in spent.items() if y > high}
    figure, axes = _figure(variants, style, far, lines=False)
    unit = unit_for([x for x, _ in spent.values()], units)
    for variant in variants:
        x, y = spent[variant.name]
        if y <= high:
            look = style[variant.name]
            bars = {"yerr": half_width(variant.loss), "ecolor": look.colour, "capsize": 2, "linestyle": "none"}
            axes.errorbar(x / unit.factor, y, **bars, **look.point(), label=variant.name)
    several = any(half_width(variant.loss) is not None for variant in variants)
    front = pareto_front(spent)
    widest = max(x for x, _ in spent.values()) / unit.factor
    steps = [(spent[v][0] / unit.factor, spent[v][1]) for v in front]
    steps.append((widest, steps[-1][1]))
    dashed = {"drawstyle": "steps-post", "color": "#777777", "linewidth": 1.2, "linestyle": "--", "zorder": 1}
    axes.plot(*zip(*steps), **dashed, label="Pareto front")
    axes.margins(0.08)
    if far:
        reaches = [half_width(v.loss) or 0.0 for v in variants]
        shown = [(v.loss.mean, half) for v, half in zip(variants, reaches) if v.name not in far]
        low, high = min(y - half for y, half in shown), max(y + half for y, half in shown)
        axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    axes.set_xlabel(f"{name} ({unit.name})" if units is TIME else f"{unit.name} per token")
    axes.set_ylabel(f"final {LOSS}")
    caption = (
        f"Final validation loss against {name}{', with 95% intervals over seeds' if several else ''}. On the dashed "
        f"Pareto front, where none is both cheaper and better: {', '.join(front)}.{_beyond(far)}"
    )
    alt = "; ".join(f"{v} {fixed(y)} at {significant(x / unit.factor)}" for v, (x, y) in spent.items())
    return Drawing(f"loss_against_{file}", figure, caption, f"Final validation loss against {name}: {alt}")


def _differences(comparison: Comparison) -> Drawing | None:
    """A forest plot: the name of each variant above its interval, so that long names take no room from it."""
    variants = [v for v in comparison.variants if v.difference is not None and math.isfinite(v.difference.mean)]
    if comparison.refusal is not None or not variants:
        return None
    style = styles(in_order(comparison))
    figure = Figure(figsize=(WIDTH, 1.3 + 0.46 * len(variants)), layout="constrained")
    axes = figure.subplots()
    limit = reach([0.0, *(_extent(variant.difference) for variant in variants)]) or NEAR
    for row, variant in enumerate(variants):
        found, look = variant.difference, style[variant.name]
        half = half_width(found)
        if found.detectable is not None:
            axes.barh(row + 0.15, 2 * found.detectable, 0.34, -found.detectable, color="#DDDDDD", zorder=0)
        if abs(found.mean) <= limit:
            axes.errorbar(
                found.mean, row + 0.15, xerr=half, **look.point(), ecolor=look.colour, capsize=3, label=variant.name
            )
        else:
            side = math.copysign(limit, found.mean)
            axes.plot(
                side, row + 0.15, marker="<" if side < 0 else ">", color=look.colour, markersize=8, clip_on=False
            )
        about = "" if half is None else f" ± {fixed(half)}"
        ground = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        above = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8, "bbox": ground}
        axes.text(0.01, row - 0.24, drawn_name(variant.name), **above)
        axes.text(0.99, row - 0.24, fixed(found.mean, signed=True) + about, ha="right", **above)
    axes.axvline(0.0, color="black", linewidth=1)
    axes.set_xlim(-1.05 * limit, 1.05 * limit)
    axes.set_ylim(len(variants) - 0.45, -0.55)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference of final validation loss (nats per token)\n← better    worse →")
    several = any(variant.difference.detectable is not None for variant in variants)
    caption = (
        f"Final validation loss minus that of {comparison.baseline}, paired by seed"
        + (", with 95% intervals. Grey: what is smaller than the seeds could show with 80% power" if several else "")
        + ". An arrow points to what is beyond the axis."
    )
    alt = "; ".join(f"{v.name}: {fixed(v.difference.mean, signed=True)}, {v.difference.verdict}" for v in variants)
    return Drawing("differences", figure, caption, f"Differences to {comparison.baseline}. {alt}")


def _extent(difference: Difference) -> float:
    half = half_width(difference)
    return max(abs(difference.mean) + (half or 0.0), difference.detectable or 0.0)
