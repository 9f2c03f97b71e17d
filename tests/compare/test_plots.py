"""The plots show the numbers of the comparison, with axes that say what they are."""

import math
import random

import numpy as np
import pytest
from lxml import etree
from made_comparisons import made_comparison
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from megaresid.compare import plots
from megaresid.compare.results import Comparison

BAD = "broken identity"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return made_comparison()


@pytest.fixture(scope="module")
def drawings(comparison) -> dict[str, plots.Drawing]:
    return {drawing.name: drawing for drawing in plots.draw(comparison)}


def lines_of(drawing: plots.Drawing) -> dict[str, np.ndarray]:
    (axes,) = drawing.figure.axes
    return {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}


def test_axes_say_what_they_show_in_which_unit(drawings):
    labels = {n: (d.figure.axes[0].get_xlabel(), d.figure.axes[0].get_ylabel()) for n, d in drawings.items()}
    loss = "validation loss (nats per token)"
    assert labels == {
        "differences": ("difference of final validation loss (nats per token)\n← better    worse →", ""),
        "loss_over_tokens": ("tokens (10⁶) of training", loss),
        "difference_over_tokens": ("tokens (10⁶) of training", "difference of validation loss\n(nats per token)"),
        "loss_over_flops": ("FLOPs of training (EFLOPs)", loss),
        "loss_over_seconds": ("time of training (minutes)", loss),
        "loss_over_rate": ("learning rate", loss),
        "loss_against_step_time": ("step time (s)", f"final {loss}"),
        "loss_against_flops_per_token": ("GFLOPs per token", f"final {loss}"),
    }


@pytest.mark.parametrize(
    ("name", "what", "factor"),
    [("loss_over_tokens", "tokens", 1e6), ("loss_over_flops", "flops", 1e18), ("loss_over_seconds", "seconds", 60)],
)
def test_curves(drawings, comparison, name, what, factor):
    lines = lines_of(drawings[name])
    assert list(lines) == [variant.name for variant in comparison.variants]
    (axes,) = drawings[name].figure.axes
    for variant, band in zip(comparison.variants, axes.collections, strict=True):
        points = [curve.points for curve in variant.curves]
        x = np.mean([[getattr(point, what) for point in of_seed] for of_seed in points], axis=0) / factor
        losses = np.array([[point.loss for point in of_seed] for of_seed in points])
        np.testing.assert_allclose(lines[variant.name], np.stack([x, losses.mean(axis=0)], axis=1))
        drawn = {tuple(np.round(vertex, 9)) for vertex in band.get_paths()[0].vertices}
        for edge in (losses.min(axis=0), losses.max(axis=0)):
            assert {tuple(np.round(vertex, 9)) for vertex in zip(x, edge)} <= drawn
        low, high = axes.get_ylim()
        assert low <= losses[:, -1].min() and losses[:, -1].max() < high < losses[:, 0].min()
    assert axes.get_xlim()[0] == 0


def test_difference_over_tokens_is_paired_by_seed(drawings, comparison):
    lines = lines_of(drawings["difference_over_tokens"])
    baseline = {curve.seed: curve.points for curve in comparison.variants[0].curves}
    for variant in comparison.variants[1:]:
        gaps = [[a.loss - b.loss for a, b in zip(c.points, baseline[c.seed])] for c in variant.curves]
        np.testing.assert_allclose(lines[variant.name][:, 1], np.mean(gaps, axis=0), atol=1e-12)


def test_only_common_seeds_are_paired(comparison):
    vanilla, other = comparison.variants[:2]
    less = plots.paired(other.curves, vanilla.curves[1:])
    assert [curve.seed for curve in less] == [2, 3]
    assert less[0].points[4].loss == other.curves[1].points[4].loss - vanilla.curves[1].points[4].loss


def test_a_step_that_one_seed_lacks_is_not_averaged(comparison):
    curves = list(comparison.variants[1].curves)
    gone = curves[0].points[3].step
    curves[0] = curves[0].model_copy(update={"points": tuple(p for p in curves[0].points if p.step != gone)})
    bad = curves[1].points[5].model_copy(update={"loss": math.nan})
    curves[1] = curves[1].model_copy(update={"points": (*curves[1].points[:5], bad, *curves[1].points[6:])})
    rows = plots.over_seeds(curves, "tokens")
    assert len(rows) == len(curves[2].points) - 2
    assert {row[0] for row in rows} == {p.tokens for i, p in enumerate(curves[2].points) if i not in (3, 5)}


def test_learning_rates(drawings, comparison):
    lines = lines_of(drawings["loss_over_rate"])
    for variant in comparison.variants:
        np.testing.assert_allclose(lines[variant.name], [(at.learning_rate, at.loss.mean) for at in variant.rates])
    (axes,) = drawings["loss_over_rate"].figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.0001", "0.0003", "0.001"]


def test_cost_and_intervals(drawings, comparison):
    (axes,) = drawings["loss_against_step_time"].figure.axes
    bars = {container.get_label(): container for container in axes.containers}
    for variant in comparison.variants:
        line, _, (reach,) = bars[variant.name].lines
        np.testing.assert_allclose(line.get_xydata(), [(variant.cost.step_seconds.mean, variant.loss.mean)])
        ends = reach.get_segments()[0][:, 1]
        np.testing.assert_allclose(ends, [variant.loss.low, variant.loss.high])
    front = lines_of(drawings["loss_against_step_time"])["Pareto front"]
    spent = {(variant.cost.step_seconds.mean, variant.loss.mean) for variant in comparison.variants}
    assert {point for point in map(tuple, front[:-1])} == brute_front(spent)


def test_forest(drawings, comparison):
    (axes,) = drawings["differences"].figure.axes
    bars = {container.get_label(): container for container in axes.containers if hasattr(container, "lines")}
    grey = [patch for patch in axes.patches if patch.get_height() != 0]
    for variant, detectable in zip(comparison.variants[1:], grey, strict=True):
        line, _, (reach,) = bars[variant.name].lines
        assert line.get_xdata()[0] == variant.difference.mean
        np.testing.assert_allclose(reach.get_segments()[0][:, 0], [variant.difference.low, variant.difference.high])
        edges = detectable.get_x(), detectable.get_x() + detectable.get_width()
        np.testing.assert_allclose(edges, [-variant.difference.detectable, variant.difference.detectable])
    low, high = axes.get_xlim()
    assert low == -high < min(variant.difference.low for variant in comparison.variants[1:])


def brute_front(points: set[tuple[float, float]]) -> set[tuple[float, float]]:
    """Those that no other point betters in one and equals or betters in the other."""
    return {
        (x, y) for x, y in points if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    }


def test_pareto_front_against_its_definition():
    draw = random.Random(3)
    for _ in range(300):
        points = {f"v{i}": (draw.randrange(6), draw.randrange(6)) for i in range(draw.randrange(1, 9))}
        front = plots.pareto_front(points)
        best = brute_front(set(points.values()))
        assert set(front) == {name for name, point in points.items() if point in best}
        assert [points[name][0] for name in front] == sorted(points[name][0] for name in front)


def test_a_far_worse_variant_does_not_press_the_others_together():
    changes = {"near": (-0.004, "better", 0.1), "nearer": (0.002, "not distinguishable", 0.2)}
    found = made_comparison({**changes, BAD: (0.75, "worse", -0.1)})  # cheapest: on the Pareto front all the same
    drawn = {drawing.name: drawing for drawing in plots.draw(found)}
    for name in ("differences", "difference_over_tokens", "loss_over_tokens", "loss_against_step_time"):
        (axes,) = drawn[name].figure.axes
        low, high = axes.get_xlim() if name == "differences" else axes.get_ylim()
        ends = [variant.loss.mean for variant in found.variants if variant.name != BAD]
        if name.startswith("difference"):
            ends = [x - ends[0] for x in ends]
        assert low < min(ends) and max(ends) < high
        assert high - low < 0.6
    for name in ("difference_over_tokens", "loss_over_tokens", "loss_against_step_time"):
        assert f"{BAD} (" in drawn[name].caption
        (legend,) = drawn[name].figure.legends
        marked = [text.get_text() for text in legend.get_texts() if "beyond" in text.get_text()]
        assert marked == [f"{BAD} (beyond the axis)"]
    assert any(text.get_text() == BAD for text in drawn["differences"].figure.axes[0].texts)


@pytest.mark.parametrize(
    ("values", "end"),
    [
        ([0.5, 0.0, 0.1, 0.35, 0.1], 0.35),  # 0.4 is four times as far from the least as the median
        ([3.04, 3.0, 3.002, 3.001, 3.06], 3.04),  # what is within 0.05 is near, however close the others
        ([2.0, math.nan, math.inf], 2.0),
    ],
)
def test_an_axis_ends_at_the_last_value_that_is_not_far(values, end):
    assert plots.reach(values) == end


def test_of_one_seed_no_interval_is_spoken_of(drawings):
    alone = {drawing.name: drawing for drawing in plots.draw(made_comparison(seeds=1))}
    for name in ("differences", "loss_against_step_time"):
        assert "interval" in drawings[name].caption
        assert "interval" not in alone[name].caption and "Grey" not in alone[name].caption


def test_no_plot_ranks_what_is_refused(comparison):
    refused = comparison.model_copy(update={"refusal": "the data differ", "orders": None, "budget": None})
    assert {drawing.name for drawing in plots.draw(refused)} == {
        "loss_over_tokens",
        "loss_over_flops",
        "loss_over_seconds",
    }


def test_without_what_can_be_drawn(comparison):
    bare = comparison.variants[0].model_copy(update={"curves": ()})
    (drawing,) = plots.draw(comparison.model_copy(update={"variants": (bare,)}))
    assert drawing.name == "loss_over_rate"
    assert plots.draw(comparison.model_copy(update={"variants": ()})) == []
    one = made_comparison({"x": (-0.01, "better", 0.1)}, seeds=1, rates=1)
    assert "loss_over_rate" not in {drawing.name for drawing in plots.draw(one)}


def test_nothing_lies_on_anything_else():
    long = "".join(chr(97 + i % 26) for i in range(60))
    found = made_comparison({f"{i:02}{long[2:]}": (0.002 * i, "worse", i / 20) for i in range(11)})
    drawn = {drawing.name: drawing for drawing in plots.draw(found)}
    for name in ("loss_over_tokens", "differences"):
        figure = drawn[name].figure
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        whole, (axes,) = figure.bbox, figure.axes
        boxes = [axes.get_tightbbox(renderer), *(legend.get_window_extent() for legend in figure.legends)]
        if name == "differences":
            boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        assert all(whole.x0 <= b.x0 and b.x1 <= whole.x1 and whole.y0 <= b.y0 and b.y1 <= whole.y1 for b in boxes)


# Viénot, Brettel and Mollon, "Digital video colourmaps for checking the legibility of displays by dichromats" (1999),
# of linear RGB.
BLINDNESS = {
    "protan": [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    "deutan": [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_differ_to_the_colour_blind(kind):
    def seen(colour):
        linear = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)])
        linear = np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1)
        return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)

    colours = [seen(colour) for colour in (plots.BASELINE, *plots.COLOURS)]
    assert min(np.abs(a - b).max() for i, a in enumerate(colours) for b in colours[:i]) > 0.1


def test_styles_of_many_variants_differ():
    found = made_comparison({f"v{i}": (0.001 * i, "worse", 0.1) for i in range(11)}, seeds=1, rates=1)
    styles = plots.styles(found.variants)
    assert len({style.marker for style in styles.values()}) == 12
    assert [name for name, style in styles.items() if style.colour == plots.BASELINE] == ["vanilla"]


def test_names_that_cannot_be_drawn_as_they_are():
    names = ("$\\frac$ _x", "\x00\x1b[31m--><b>", "_hidden")
    found = made_comparison({name: (0.01, "worse", 0.1) for name in names})
    for drawing in plots.draw(found):
        etree.fromstring(plots.as_svg(drawing.figure).encode())
        for legend in drawing.figure.legends:
            drawn = [text.get_text() for text in legend.get_texts()]
            assert drawn[-3:] == ["$\\frac$ _x", "\ufffd\ufffd[31m--><b>", "_hidden"]
    assert plots.drawn_name("a" * 100) == "a" * 29 + "…" + "a" * 29
