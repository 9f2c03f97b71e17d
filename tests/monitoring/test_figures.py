"""The figures of diagnostics: what there is to draw is drawn, with named axes, for every shape that findings have."""

import numpy as np
import pytest

from megaresid.monitoring.figures import figures
from megaresid.monitoring.findings import DepthMatrix, Findings, MixingMatrices


def findings_of(layers: int) -> Findings:
    found = Findings()
    sites = [f"{layer:02d}.{kind}" for layer in range(layers) for kind in ("attention", "mlp")]
    for place in sites:
        found.note("read_rms", place, 1.5)
        found.note("update_rms", place, 0.0)  # has no logarithm
        found.note("site.gate", place, 0.5)
        found.note("site.gate_min", place, 0.25)
        found.note("site.gate_max", place, 0.75)
        found.streams[place] = [1.0, 2.0]
    for place in ("embed", "00", "head", "shared"):
        found.note("gradient_norm", place, 3.0)
    weights = {place: {"embed": 0.25, f"source of {place}": 0.75} for place in sites}
    found.depth["site.depth"] = DepthMatrix(weights)
    found.mixing["site.mixing"] = MixingMatrices({place: np.eye(2) for place in sites}, np.eye(2))
    return found


@pytest.mark.parametrize("layers", [1, 3, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 48))])
def test_everything_is_drawn(layers, tmp_path):
    drawn = dict(figures(findings_of(layers), "step 10"))
    assert list(drawn) == ["by_depth", "by_depth_declared", "streams", "site.depth", "site.mixing"]
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert "step 10" in figure.get_suptitle()
    panels = {axes.get_title(): axes for axes in drawn["by_depth"].axes}
    assert list(panels) == ["RMS of what a site reads", "RMS of a site's update", "norm of the gradient"]
    reads, updates, gradients = panels.values()
    assert all(axes.get_xlabel() == "layer" for axes in panels.values())
    assert reads.get_yscale() == "log" and updates.get_yscale() == "linear"
    attention, mlp = reads.get_lines()
    assert list(attention.get_xdata()) == list(range(layers))
    assert list(mlp.get_xdata()) == [layer + 0.5 for layer in range(layers)]
    assert list(gradients.get_lines()[0].get_xdata()) == [-1, 0, 1, 2]
    (gates,) = drawn["by_depth_declared"].axes
    assert [segment[:, 1].tolist() for segment in gates.collections[0].get_segments()] == [[0.25, 0.75]] * layers


def test_a_heat_map_shows_the_weights_where_they_belong():
    found = Findings(depth={"site.depth": DepthMatrix({"00.mlp": {"embed": 1.0}, "close": {"embed": 0.25, "y": 0.75}})})
    ((name, figure),) = figures(found, "step 10")
    axes = figure.axes[0]
    drawn = axes.images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(drawn, [[1.0, np.nan], [0.25, 0.75]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["00.mlp", "close"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["embed", "y"]
    assert axes.get_xlabel() == "source" and axes.get_ylabel() == "site that reads"


def test_mixing_is_drawn_with_the_sums_of_rows_and_columns():
    matrix = np.array([[1.0, -0.5], [0.25, 2.0]])
    found = Findings(mixing={"site.mixing": MixingMatrices({"00.mlp": matrix}, None)})
    ((name, figure),) = figures(found, "step 10")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), matrix)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.5", "2.2"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1.2", "1.5"]


@pytest.mark.parametrize("least, limits", [(0.0, (0.0, 2.0)), (-0.5, (-2.0, 2.0))])
def test_all_matrices_have_one_scale_of_colours(least, limits):
    matrices = MixingMatrices({"00.mlp": np.array([[1.0, least], [0.0, 1.0]])}, np.array([[2.0, 0.0], [0.0, 0.5]]))
    ((_, figure),) = figures(Findings(mixing={"site.mixing": matrices}), "step 10")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in images] == [limits] * 2 and len({image.cmap.name for image in images}) == 1


def test_a_logarithmic_axis_has_plain_numbers():
    found = Findings()
    for layer, value in enumerate((0.0282, 0.0118, 0.0123, 0.0145)):
        found.note("read_rms", f"{layer:02d}.attention", value)
    ((_, figure),) = figures(found, "step 10")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (low, high), labels = axes.get_ylim(), axes.get_yticklabels(which="both")
    shown = {label.get_text(): label.get_position()[1] for label in labels if low <= label.get_position()[1] <= high}
    assert axes.get_yscale() == "log" and len(shown) >= 3
    for text, value in shown.items():
        assert not text or (float(text) == pytest.approx(value) and "e" not in text)


def test_nothing_found_is_nothing_drawn():
    assert not [*figures(Findings(), "step 10")]
