"""What is known to go wrong with wide streams: a transposed mixing, streams that never separate, memory."""

from types import SimpleNamespace

import pytest
import torch
from small_models import IDX, SHAPE, loss_of, model_of
from test_initialisation import EXACT_SHAPE, deviation
from torch import Tensor
from variant_row import Row

from megaresid.errors import UserError
from megaresid.model.gpt import GPT, build
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS, ModelShape
from megaresid.training.estimate import saved_activation_bytes

N = 4


def site_parameters(model: GPT) -> list[dict[str, Tensor]]:
    """Of every site in order, by local name."""
    return [dict(site.named_parameters()) for part in model.parts[2:-1] for site in part.sites.values()]


def mixed_streams(spec: str, logits: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Streams before and after a site whose mixing is set, and whose sublayer gives nothing."""
    model = model_of(spec, away=0)
    site = model.parts[2].sites["attention"]
    parameter = dict(site.named_parameters())[name]
    with torch.no_grad():
        parameter.view(-1)[-logits.numel() :] = logits.flatten()
        before = torch.randn(2, 3, N, SHAPE.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (after,), _ = site((before,), (), lambda normed, side: (torch.zeros_like(normed), side))
    return before, after


def test_row_k_of_h_res_makes_stream_k():
    """H_res[k, k + 1] = 1 makes each stream its successor; transposed, its predecessor."""
    successor = 40 * torch.eye(N, dtype=torch.float64).roll(1, dims=1)
    before, after = mixed_streams("mhc", successor, "b")
    assert (after - before.roll(-1, dims=2)).abs().max() < 1e-12


def test_a_permutation_takes_stream_k_from_where_it_sends_k():
    """Of the 24 permutations in lexicographic order, (1, 2, 3, 0) is number 9."""
    chosen = torch.full((24,), -40.0, dtype=torch.float64)
    chosen[9] = 0
    before, after = mixed_streams("mhc_lite", chosen, "b")
    assert (after - before[:, :, [1, 2, 3, 0]]).abs().max() < 1e-12


def test_row_j_of_a_r_is_where_stream_j_goes():
    to_successor = torch.eye(N, dtype=torch.float64).roll(1, dims=1)
    before, after = mixed_streams("hyper_connections(dynamic=false)", to_successor, "A_r")
    assert torch.equal(after, before.roll(1, dims=2))


def relative_spread_after_training(model: GPT) -> float:
    """How far the streams that enter the close are from their mean, after 60 steps of AdamW in learning to count."""
    stepper = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        stepper.zero_grad()
        first = torch.randint(SHAPE.vocab_size, (8, 1), generator=generator)
        loss_of(model, (first + torch.arange(9)) % SHAPE.vocab_size).backward()
        stepper.step()
    closed = []
    model.parts[-1].register_forward_pre_hook(lambda module, given: closed.append(given[0][0]))
    model(IDX[:, :-1])
    mean = closed[0].mean(-2, keepdim=True)
    return ((closed[0] - mean).norm() / closed[0].norm()).item()


SIX_LAYERS = SHAPE.model_copy(update={"layers": 6})


OTHERS = [pytest.param(spec, marks=pytest.mark.full) for spec in ("hyper_connections", "mhc_lite")]


@pytest.mark.parametrize("spec", ["mhc", *OTHERS])
def test_streams_separate(spec):
    assert relative_spread_after_training(model_of(spec, SIX_LAYERS, away=0, dtype=torch.float32)) > 1e-2


@pytest.mark.full
@pytest.mark.parametrize("spec", ["mhc", "mhc_lite"])
def test_from_a_symmetric_start_they_never_would(spec):
    model = model_of(spec, SIX_LAYERS, away=0, dtype=torch.float32)
    with torch.no_grad():
        for site in site_parameters(model):
            site["b"][:N] = -torch.log(torch.tensor(N - 1.0))
    assert relative_spread_after_training(model) < 1e-5


@pytest.mark.parametrize(
    "spec",
    [
        "hyper_connections(streams=1)",
        "hyper_connections(streams=1, dynamic=false)",
        "frac_connections(fractions=1)",
        "frac_connections(fractions=8)",
    ],
)
def test_one_stream_starts_as_vanilla_bit_for_bit(spec):
    found, vanilla = (model_of(each, away=0)(IDX[:, :-1])[0] for each in (spec, "vanilla"))
    assert torch.equal(found, vanilla)


@pytest.mark.parametrize("spec", ["mhc(close=sum)", "mhc_lite(close=sum)"])
def test_a_sum_of_streams_is_vanilla_up_to_epsilon(spec):
    row = Row(spec, define=None, added_parameters=0)
    assert ModelPlan(SHAPE, residual=spec).residual_of(0).equals_vanilla == "up to epsilon"
    assert max(deviation(row, SHAPE)) > 1e-6
    assert max(deviation(row, EXACT_SHAPE)) < 1e-5


def test_hyper_connections_start_as_the_paper_says():
    for index, site in enumerate(site_parameters(model_of("hyper_connections", away=0))):
        assert site["A_m"].flatten().tolist() == [float(j == index % N) for j in range(N)]
        assert torch.equal(site["A_r"], torch.eye(N, dtype=torch.float64))
        assert (site["B"] == 1).all() and (site["W"] == 0).all()
        for name in ("s_a", "s_b"):
            assert site[name].shape == (1,) and site[name].item() == pytest.approx(0.01)


def test_hyper_connections_divide_the_start_of_output_projections_by_sqrt_n_if_asked():
    """GPT-2's 0.02 / sqrt(2 layers), of 3 layers; drawn values are within 3% of their distribution's deviation."""
    shape = ModelShape(layers=3, heads=2, width=128, context=8, vocab_size=40)
    for spec, divisor in (("out_scale=true", 2.0), ("out_scale=true, streams=2", 2**0.5), ("out_scale=false", 1.0)):
        model = build(ModelPlan(shape, residual=f"hyper_connections({spec})"), seed=0)
        for layer in model.parts[2:-1]:
            for linear in (layer.attention.o_proj, layer.mlp.proj):
                assert linear.weight.std().item() == pytest.approx(0.02 / 6**0.5 / divisor, rel=0.03), spec
            assert layer.mlp.fc.weight.std().item() == pytest.approx(0.02, rel=0.03), spec


@pytest.mark.parametrize(("spec", "elsewhere"), [("mhc", -5.0), ("mhc_lite", -8.0)])
def test_the_balanced_start_reads_vanillas_input_from_copies_of_it(spec, elsewhere):
    for index, site in enumerate(site_parameters(model_of(spec, away=0))):
        read = torch.sigmoid(site["b"][:N])
        assert read.sum().item() == pytest.approx(1, abs=1e-7) and read[index % N].item() == pytest.approx(0.85)
        assert (site["b"][N : 2 * N] == 0).all() and (site["phi"] == 0).all()
        assert site["b"][2 * N :].unique().tolist() == [elsewhere, 0.0] and site["b"][2 * N] == 0
        assert torch.allclose(site["alpha"], torch.full((3,), 0.01, dtype=torch.float64))


def test_another_reduction_in_the_last_layer_is_no_lost_end():
    plan = ModelPlan(SHAPE, residual="3*mhc(close=sum) + mhc(close=mean)")
    assert plan.residual_of(3).options.close == "mean"


def test_a_width_that_cannot_be_cut_is_refused_before_anything_is_built():
    with pytest.raises(UserError, match="width 32 is not divisible by fractions=5"):
        ModelPlan(SHAPE, residual="frac_connections(fractions=5)")


@pytest.mark.parametrize("spec", ["hyper_connections(dynamic=false)", "hyper_connections", "mhc", "mhc_lite"])
def test_four_streams_keep_at_most_half_as_much_again_for_the_backward_pass(spec):
    """GPT-2 Medium, counted: on vanilla's sixteen widths a layer, six more of streams and two of sublayers' outputs."""
    shape: ModelShape = PRESETS["gpt2-medium"]
    kept, vanilla = (
        saved_activation_bytes(ModelPlan(shape, residual=each), SimpleNamespace(micro=4), False, None)
        for each in (spec, "vanilla")
    )
    assert kept < 1.5 * vanilla
