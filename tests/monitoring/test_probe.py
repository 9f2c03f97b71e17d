"""What a probe finds, against forwards written out here in fp64 and plain loops over their tokens."""

import gc
import math
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from small_models import IDX, SHAPE, model_of
from torch import nn
from torch.nn.functional import layer_norm

from megaresid.monitoring.findings import DepthMatrix
from megaresid.monitoring.mirror import mirror
from megaresid.monitoring.probe import effective_number, probe
from megaresid.readings import Depth, Mixing, Values

TOKENS = IDX[:, :-1]
SITES = [f"{layer:02d}.{kind}" for layer in range(SHAPE.layers) for kind in ("attention", "mlp")]


class Passed:
    """What a hand-written forward has read at each place and changed at each site, [B, T, ...]."""

    def __init__(self, model):
        self.model, self.reads, self.updates = model, {}, {}

    def x0(self):
        tokens, opening = self.model.parts[0], self.model.parts[1]
        return tokens.weight[TOKENS] + opening.positions.weight[: TOKENS.shape[1]]

    def sites(self):
        """(place, site, function of its sublayer)."""
        for number, layer in enumerate(self.model.parts[2:-1]):
            for kind in ("attention", "mlp"):
                sublayer = getattr(layer, kind)
                yield f"{number:02d}.{kind}", layer.sites[kind], lambda x, sublayer=sublayer: sublayer(x, ())[0]

    def norm(self, norm, x, epsilon=SHAPE.norm_epsilon):
        return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, epsilon)


def vanilla(passed):
    x = passed.x0()
    for place, site, sublayer in passed.sites():
        passed.reads[place] = x
        passed.updates[place] = sublayer(passed.norm(site.norm, x))
        x = x + passed.updates[place]
    passed.reads["close"] = x


def post_ln(passed):
    x = passed.x0()
    for place, site, sublayer in passed.sites():
        passed.reads[place] = x
        after = passed.norm(site.norm, x + sublayer(x))
        passed.updates[place] = after - passed.norm(site.norm, x)
        x = after
    passed.reads["close"] = x


def hyper_connections(passed):
    H = torch.stack([passed.x0()] * 4, 2)
    passed.streams, passed.mixing = {}, {}
    for place, site, sublayer in passed.sites():
        passed.streams[place] = H
        read = sum(site.A_m[j, 0] * H[:, :, j] for j in range(4))
        y = sublayer(passed.norm(site.norm, read))
        passed.reads[place], passed.mixing[place] = read, site.A_r.T.detach().numpy()
        passed.updates[place] = torch.stack([site.B[k] * y for k in range(4)], 2)
        H = torch.stack([sum(site.A_r[j, k] * H[:, :, j] for j in range(4)) + site.B[k] * y for k in range(4)], 2)
    passed.streams["close"], passed.reads["close"] = H, H.sum(2)


def attention_residuals(passed):
    sources, passed.weights = [passed.x0()], {}

    def routed(module, place):
        if not hasattr(module, "depth"):
            return sources[0]
        query = module.depth.query * module.depth.key_scale
        normed = [v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-6) for v in sources]
        weights = torch.stack([(v * query).sum(-1) for v in normed], -1).softmax(-1)
        passed.weights[place] = weights
        return sum(weights[..., j : j + 1] * v for j, v in enumerate(sources))

    for place, site, sublayer in passed.sites():
        passed.reads[place] = routed(site, place)
        passed.updates[place] = sublayer(passed.norm(site.norm, passed.reads[place], 1e-12))
        sources.append(passed.updates[place])
    passed.reads["close"] = routed(passed.model.parts[-1], "close")


FORWARDS = {
    "vanilla": vanilla,
    "post_ln": post_ln,
    "hyper_connections(dynamic=false)": hyper_connections,
    "attention_residuals": attention_residuals,
}


@pytest.fixture(scope="module", params=FORWARDS)
def passed_and_found(request):
    model = model_of(request.param).eval()
    passed = Passed(model)
    with torch.no_grad():
        FORWARDS[request.param](passed)
    return passed, probe(mirror(model), TOKENS)


def tokens_of(x):
    """Each token's vector, over streams too."""
    return x.detach().reshape(-1, math.prod(x.shape[2:])).numpy()


def rms(vector):
    return math.sqrt(sum(float(value) ** 2 for value in vector) / len(vector))


def mean_rms(x):
    return np.mean([rms(vector) for vector in tokens_of(x)])


def test_what_sites_read_and_update(passed_and_found):
    passed, found = passed_and_found
    assert list(found.by_depth["read_rms"]) == [*SITES, "close"] and list(found.by_depth["update_rms"]) == SITES
    for place, read in passed.reads.items():
        assert found.by_depth["read_rms"][place] == pytest.approx(mean_rms(read), rel=1e-9), place
    for place, update in passed.updates.items():
        assert found.by_depth["update_rms"][place] == pytest.approx(mean_rms(update), rel=1e-9), place
        pairs = zip(tokens_of(update), tokens_of(passed.reads[place]), strict=True)
        ratio = np.mean([rms(changed) / rms(read) for changed, read in pairs])
        assert found.by_depth["update_ratio"][place] == pytest.approx(ratio, rel=1e-9), place


def test_the_cosine_between_successive_layers(passed_and_found):
    passed, found = passed_and_found
    firsts = [f"{layer:02d}.attention" for layer in range(SHAPE.layers)] + ["close"]
    assert list(found.by_depth["cosine"]) == [f"{layer:02d}" for layer in range(SHAPE.layers)]
    for layer, (before, after) in enumerate(zip(firsts, firsts[1:])):
        pairs = zip(tokens_of(passed.reads[before]), tokens_of(passed.reads[after]), strict=True)
        expected = np.mean([a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in pairs])
        assert found.by_depth["cosine"][f"{layer:02d}"] == pytest.approx(expected, rel=1e-9), layer


def test_the_effective_depth(passed_and_found):
    passed, found = passed_and_found
    norms = [mean_rms(update) for update in passed.updates.values()]
    entropy = -sum(norm / sum(norms) * math.log(norm / sum(norms)) for norm in norms)
    assert found.of_model["effective_depth"] == pytest.approx(math.exp(entropy), rel=1e-9)
    assert 1 < found.of_model["effective_depth"] < len(SITES)


def test_the_effective_number_counts_equal_shares():
    assert effective_number([2.0] * 5 + [0.0]) == pytest.approx(5)
    assert effective_number([0.0, 3.0]) == pytest.approx(1)
    assert math.isnan(effective_number([0.0, 0.0]))


def test_streams_and_mixing_of_a_wide_state():
    model = model_of("hyper_connections(dynamic=false)").eval()
    passed = Passed(model)
    with torch.no_grad():
        hyper_connections(passed)
    found = probe(mirror(model), TOKENS)
    assert list(found.streams) == list(found.by_depth["stream_spread"]) == [*SITES, "close"]
    for place, H in passed.streams.items():
        around = (H - H.mean(2, keepdim=True)).detach()
        spread = np.mean([rms(a) / rms(b) for a, b in zip(tokens_of(around), tokens_of(H), strict=True)])
        assert found.by_depth["stream_spread"][place] == pytest.approx(spread, rel=1e-9, abs=1e-12), place
        assert found.streams[place] == pytest.approx([mean_rms(H[:, :, n]) for n in range(4)], rel=1e-9)
    product, (name,) = np.eye(4), found.mixing
    for place, matrix in passed.mixing.items():
        product = np.array([[sum(matrix[k, m] * product[m, j] for m in range(4)) for j in range(4)] for k in range(4)])
        np.testing.assert_allclose(found.mixing[name].by_place[place], matrix, rtol=1e-12)
        for which, of_matrix in (("", matrix), ("_product", product)):
            rows, columns = abs(of_matrix.sum(1)).max(), abs(of_matrix.sum(0)).max()
            assert found.by_depth[f"{name}{which}_row_gain"][place] == pytest.approx(rows, rel=1e-9)
            assert found.by_depth[f"{name}{which}_column_gain"][place] == pytest.approx(columns, rel=1e-9)
    np.testing.assert_allclose(found.mixing[name].composite, product, rtol=1e-9)


def test_the_product_of_matrices_that_depend_on_the_token_is_each_tokens_own():
    """The mean of products is not the product of means."""
    model = model_of("vanilla")
    matrices = torch.randn(len(SITES), *TOKENS.shape, 3, 3, dtype=torch.float64)
    places = iter(range(len(SITES)))
    for layer in model.parts[2:-1]:
        for site in layer.sites.values():
            site.diagnose = lambda state, n=next(places): {"mixing": Mixing(matrices[n])}
    copy = mirror(model)
    for mine, theirs in zip(copy.modules(), model.modules()):
        if "diagnose" in vars(theirs):
            mine.diagnose = theirs.diagnose
    found = probe(copy, TOKENS)
    products, rows = [], []
    for token in matrices.flatten(1, 2).transpose(0, 1):
        product = np.eye(3)
        for matrix in token.numpy():
            product = matrix @ product
        products.append(product)
        rows.append(abs(product.sum(1)).max())
    np.testing.assert_allclose(found.mixing["site.mixing"].composite, np.mean(products, 0), rtol=1e-9)
    assert found.by_depth["site.mixing_product_row_gain"][SITES[-1]] == pytest.approx(np.mean(rows), rel=1e-9)


def test_the_weights_over_depth_are_a_row_of_a_matrix():
    model = model_of("attention_residuals").eval()
    passed = Passed(model)
    with torch.no_grad():
        attention_residuals(passed)
    (matrix,) = probe(mirror(model), TOKENS).depth.values()
    assert list(matrix.weights) == [*SITES[1:], "close"] and len(matrix.sources) == len(SITES) + 1
    for place, weights in passed.weights.items():
        assert [*matrix.weights[place].values()] == pytest.approx(weights.mean((0, 1)).tolist(), rel=1e-9), place
    array = matrix.array()
    assert array.shape == (len(SITES), len(SITES) + 1)
    assert np.isnan(array[0]).sum() == len(SITES) - 1 and not np.isnan(array[-1]).any()


def test_readings_of_sites_mixers_and_the_close_are_kept_by_kind():
    model = mirror(model_of("vanilla"))
    gate = torch.linspace(-1, 3, 10001, dtype=torch.float64)
    model.parts[2].sites["mlp"].diagnose = lambda state: {"gate": Values(gate)}
    model.parts[3].attention.diagnose = lambda x, side: {"decay": Values(torch.tensor(0.5))}
    model.parts[-1].diagnose = lambda state: {"route": Depth(torch.tensor([0.25, 0.75]), ("embed", "x"))}
    found = probe(model, TOKENS)
    assert found.by_depth["site.gate"] == {"00.mlp": pytest.approx(1)}
    assert found.by_depth["site.gate_min"] == {"00.mlp": -1} and found.by_depth["site.gate_max"] == {"00.mlp": 3}
    assert found.by_depth["mixer.decay"] == {"01.attention": 0.5} and "mixer.decay_min" not in found.by_depth
    sample = found.samples["site.gate"]["00.mlp"]
    assert len(sample) == 4096 and sample.min() < -0.99 and sample.max() > 2.99
    assert found.depth["site.route"].weights == {"close": {"embed": 0.25, "x": 0.75}}
    assert found.numbers()["diagnostics/mixer.decay/01.attention"] == 0.5


def test_a_sample_of_many_values_has_all_heads_alike():
    model = mirror(model_of("vanilla"))
    of_heads = torch.arange(16.0).expand(4, 1024, 16)
    model.parts[2].attention.diagnose = lambda x, side: {"beta": Values(of_heads)}
    sample = probe(model, TOKENS).samples["mixer.beta"]["00.attention"]
    np.testing.assert_array_equal(sample, probe(model, TOKENS).samples["mixer.beta"]["00.attention"])
    heads, counts = np.unique(sample, return_counts=True)
    assert [*heads] == [*range(16)] and counts.min() > 0.7 * 4096 / 16 and counts.max() < 1.3 * 4096 / 16


def test_sources_stand_in_the_order_of_depth_whoever_names_them_first():
    rows = {"02.mlp": {"00": 1.0, "embed": 0.0}, "10.mlp": {"an own name": 0.0, "02.mlp": 0.5, "10.attention": 0.5}}
    rows["close"] = {"00.attention-01.attention": 0.25, "02": 0.25, "02.attention": 0.5}
    names = ["embed", "00", "00.attention-01.attention", "02.attention", "02.mlp", "02", "10.attention", "an own name"]
    assert DepthMatrix(rows).sources == names


@pytest.mark.parametrize("residual", ["mudd_former", "parallel", "rezero", "siamese_norm", "frac_connections"])
def test_every_site_of_other_variants_has_finite_numbers(residual):
    found = probe(mirror(model_of(residual)), TOKENS)
    sites = found.by_depth["update_rms"]
    assert len(sites) in (SHAPE.layers, 2 * SHAPE.layers)
    assert [*found.by_depth["read_rms"]] == [*sites, "close"] and len(found.by_depth["cosine"]) == SHAPE.layers
    assert all(map(math.isfinite, found.numbers().values()))


def test_a_mirror_shares_what_the_model_holds_and_none_of_its_hooks():
    model = model_of("pro_res(warmup=4)").train()
    copy = mirror(model)
    assert [*map(id, copy.parameters())] == [*map(id, model.parameters())]
    assert [*map(id, copy.buffers())] == [*map(id, model.buffers())]
    assert not copy.training and model.training
    probe(copy, TOKENS)
    for module in [*model.modules(), *copy.modules()]:
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_where_a_reading_fails_the_forward_is_finished_and_the_hooks_are_taken_away():
    """Parameters that ranks share out are gathered by all of them, or by none."""
    copy, gathered = mirror(model_of("vanilla")), []

    def fail(state):
        raise RuntimeError("no luck")

    def fail_later(state):
        raise RuntimeError("and no wonder")

    @contextmanager
    def whole(parameters):
        gathered.append(len(list(parameters)))
        yield

    copy.parts[3].sites["mlp"].diagnose = fail
    copy.parts[4].sites["mlp"].diagnose = fail_later
    with pytest.raises(RuntimeError, match="no luck"):
        probe(copy, TOKENS, whole)
    assert gathered == [len(list(part.parameters())) for part in (copy.shared, *copy.parts)]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copy.modules())


@pytest.mark.parametrize(
    "readings, told",
    [
        (lambda: None, "diagnose of 00.mlp gives a NoneType, no mapping"),
        (lambda: {"gate": 0.5}, "diagnose of 00.mlp: gate is a float, none of"),
        (lambda: {"gate": Values(0.5)}, "no attribute"),
        (lambda: {"route": Depth(torch.ones(2, 3), ("a", "b"))}, r"weights \[2, 3\] of 2 sources"),
        (lambda: {"route": Depth(torch.tensor(1.0), ("a",))}, r"weights \[\] of 1 sources"),
        (lambda: {"mixing": Mixing(torch.ones(2, 3))}, r"a matrix \[2, 3\] is not square"),
        (lambda: {"mixing": Mixing(torch.ones(2))}, r"a matrix \[2\] is not square"),
    ],
)
def test_what_is_no_reading_is_told(readings, told):
    model = mirror(model_of("vanilla"))
    model.parts[2].sites["mlp"].diagnose = lambda state: readings()
    with pytest.raises(Exception, match=told):
        probe(model, TOKENS)


def test_what_a_reading_runs_is_not_looked_at():
    model, plain = mirror(model_of("vanilla")), probe(mirror(model_of("vanilla")), TOKENS)
    site, mixer = model.parts[2].sites["attention"], model.parts[3].attention
    site.diagnose = lambda state: {"gate": Values(site.enter(tuple(7 * x for x in state))[0])}
    mixer.diagnose = lambda x, side: {"output": Values(mixer(x, side)[0])}
    found = probe(model, TOKENS)
    for quantity in ("read_rms", "update_rms", "update_ratio", "cosine"):
        assert found.by_depth[quantity] == plain.by_depth[quantity], quantity
    assert found.by_depth["site.gate"].keys() == {"00.attention"}
    assert found.by_depth["mixer.output"].keys() == {"01.attention"}


def test_of_several_tensors_of_a_state_the_update_is_of_the_one_that_is_changed_most():
    model, outputs = mirror(model_of("vanilla")), []
    site = model.parts[-2].sites["mlp"]

    def forward(state, side, sublayer):
        y, side = sublayer(site.norm(state[0]), side)
        outputs.append(y)
        return (state[0] + y, 3 * y), side

    site.forward = forward
    found = probe(model, TOKENS)
    assert found.by_depth["update_rms"][SITES[-1]] == pytest.approx(3 * mean_rms(outputs[0]), rel=1e-9)


@torch.no_grad()
def test_of_inputs_q_k_and_v_all_are_what_a_site_reads():
    model = mirror(model_of("mudd_former"))
    place, site = SITES[2], model.parts[3].sites["attention"]
    norms, inputs = [*site.norm.values()], []
    for norm in norms:
        norm.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model(TOKENS)
    together = torch.stack(inputs, 2)
    assert together.shape[2] == len(norms) == 3
    assert probe(model, TOKENS).by_depth["read_rms"][place] == pytest.approx(mean_rms(together), rel=1e-9)


@torch.no_grad()
def test_of_inputs_q_k_and_v_without_norms_all_are_what_a_site_reads():
    model = mirror(model_of("vanilla"))
    site, sublayer = model.parts[2].sites["attention"], model.parts[2].attention
    site.norm = nn.Identity()
    site.enter = lambda state: ((state[0], 2 * state[0], 3 * state[0]), None)
    sublayer.forward = lambda x, side: (x[0], side)
    tokens = model.parts[1](model.parts[0](TOKENS))[0]
    inputs = torch.stack([tokens, 2 * tokens, 3 * tokens], 2)
    assert probe(model, TOKENS).by_depth["read_rms"]["00.attention"] == pytest.approx(mean_rms(inputs), rel=1e-9)


@torch.no_grad()
def test_mixers_and_the_close_show_themselves_for_what_they_get():
    """The side channel that goes along with the depth too, which the close's state is without."""
    model, told, got = mirror(model_of("vanilla", attention="value_residual")), [], []
    mixer, close = model.parts[4].attention, model.parts[-1]
    mixer.register_forward_pre_hook(lambda _, arguments: got.append(arguments[1]))
    mixer.diagnose = lambda x, side: told.append(side) or {}
    close.diagnose = lambda state: told.append(state) or {}
    probe(model, TOKENS)
    side, state = told
    assert len(side) == 1 and side[0] is got[0][0]
    assert len(state) == close.state_length == 1


def test_products_are_exact_under_autocast():
    model, found = mirror(model_of("hyper_connections(dynamic=false)", dtype=torch.float32)), {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (found[enabled],) = probe(model, TOKENS).mixing.values()
    np.testing.assert_allclose(found[True].composite, found[False].composite, rtol=1e-12)


def test_nothing_that_was_computed_stays_in_memory():
    model, seen = mirror(model_of("hyper_connections")), []
    for part in model.parts[2:-1]:
        for site in part.sites.values():
            site.register_forward_hook(lambda _, arguments, output: seen.append(weakref.ref(output[0][0])))
    gc.disable()
    try:
        findings = probe(model, TOKENS)
        assert findings.numbers() and len(seen) >= len(SITES) and not any(ref() is not None for ref in seen)
    finally:
        gc.enable()


def test_a_site_without_a_norm_reads_what_its_sublayer_gets():
    model = mirror(model_of("vanilla"))
    site = model.parts[2].sites["attention"]
    site.norm = nn.Identity()
    found = probe(model, TOKENS)
    tokens = model.parts[1](model.parts[0](TOKENS))[0]
    assert found.by_depth["read_rms"]["00.attention"] == pytest.approx(mean_rms(tokens), rel=1e-9)
