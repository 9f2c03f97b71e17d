"""What sites and closes show of themselves: readings from which the definition gives what they compute, and no other
numbers do, for the streams are random and more in width than in number.
"""

from collections import defaultdict

import pytest
import torch
from small_models import IDX, SHAPE, model_of
from torch import Tensor
from variant_models import layer_norm
from variant_table import ONE_OF_EACH, ROWS

from megaresid.model.gpt import GPT
from megaresid.model.layer import Layer
from megaresid.readings import Depth, Mixing, Values
from megaresid.residual.stream import Site

SILENT = {
    "laurel_lr": "two matrices: neither a gate nor a scale",
    **dict.fromkeys(("vanilla", "parallel", "complete_p"), "norms alone"),
    **dict.fromkeys(("post_ln", "deep_norm", "sandwich", "peri_ln", "keel"), "norms and constants alone"),
    **dict.fromkeys(("layer_norm_scaling", "siamese_norm"), "norms and constants alone"),
}
"""Variants that show nothing, and why."""

HISTORIES = {
    *("attention_residuals", "block_attention_residuals", "delta_attention_residuals"),
    *("dense_former", "mudd_former", "laurel_pa"),
}
"""Variants that weigh what earlier layers gave, which is there in a run of the whole model alone."""


def name_of(row) -> str:
    return row.spec.partition("(")[0]


def model_with(row, dtype=torch.float64) -> GPT:
    return model_of(row.spec, dtype=dtype, step=row.step).eval()


def sites_of(model: GPT) -> list[tuple[int, Site]]:
    """Every site with the number of the sublayer before which it stands."""
    layers = [part for part in model.parts if isinstance(part, Layer)]
    return [
        (2 * layer + (kind == "mlp"), site)
        for layer, part in enumerate(layers)
        for kind, site in part.sites.items()
    ]


def random_state(model: GPT, index: int, tokens: tuple[int, int] = (2, 3), dtype=torch.float64) -> tuple[Tensor, ...]:
    """Of the shapes that enter sublayer ``index``."""
    generator = torch.Generator().manual_seed(index)
    entries = model.plan.residual_of(min(index // 2, SHAPE.layers - 1)).state_spec(index)
    drawn = (torch.randn(*tokens, *entry.shape, generator=generator, dtype=torch.float64) for entry in entries)
    return tuple(tensor.to(dtype) for tensor in drawn)


class Sublayer:
    """Acts on each token alone."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.scale = 1 + 0.3 * torch.randn(SHAPE.width, generator=generator, dtype=torch.float64)

    def of(self, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * x)

    def __call__(self, x, side):
        return self.of(x), side


F, G = Sublayer(0), Sublayer(1)


def normed(x: Tensor, p: dict[str, Tensor], name: str = "norm") -> Tensor:
    return layer_norm(x, p, name) if f"{name}.weight" in p else x


def gated(p, index, state, gate):
    return state[0] + gate * F.of(normed(state[0], p))


def rezero(p, index, state, gate):
    x = gated(p, index, state, gate)
    return x + gate * G.of(normed(x, p, "norm_mlp"))


def rescaled(p, index, state, gate):
    xn = normed(state[0], p)
    return state[0] + F.of(xn) + gate * G.of(normed(xn, p, "norm_mlp"))


def weighed(p, index, state, gate, skip):
    return skip * state[0] + gate * F.of(normed(state[0], p))


def blended(p, index, state, skip, x0):
    x = skip * state[0] + x0 * state[-1]
    return x + F.of(normed(x, p))


def joined(p, index, state, skip):
    """Of 4 layers number 2 stands opposite the one just before it, whose output is the stream itself."""
    x = state[0] + skip * (state[0] if index == 4 else state[-1])
    return x + F.of(normed(x, p))


def rewritten(p, index, state, beta, target, read=None):
    X = state[0][..., None, :] if read is None else state[0]
    x = X[..., 0, :] if read is None else (read * X).sum(-2)
    h = F.of(normed(x, p))
    k = (h / (h.pow(2).sum(-1, keepdim=True) + 1e-10).sqrt())[..., None, :]
    new = X + beta[..., None] * (target[..., None] - (k * X).sum(-1, keepdim=True)) * k
    return new[..., 0, :] if read is None else new


def connected(p, index, state, read, mixing, write):
    """H' = mixing H + write f(LN(read^T H)): rows of the matrix are the streams after the site."""
    n, inputs = read.shape[-2:]
    H = state[0].flatten(2).unflatten(-1, (n, -1))
    h = torch.einsum("...jc,...jw->...cw", read, H).flatten(-2)
    y = F.of(normed(h, p)).unflatten(-1, (inputs, -1))
    after = torch.einsum("...kj,...jw->...kw", mixing, H) + write[..., None] * y
    return after.reshape(state[0].shape)


SITES = {
    **dict.fromkeys(("skip_init", "layer_scale", "learned_scale", "adaptive_scale", "pro_res"), gated),
    **dict.fromkeys(("token_gate", "shared_token_gate", "channel_gate"), gated),
    **dict.fromkeys(("hyper_connections", "frac_connections", "mhc", "mhc_lite"), connected),
    **dict.fromkeys(("deep_delta", "deep_delta_expanded"), rewritten),
    "rezero": rezero,
    "parallel_rescaled": rescaled,
    "laurel_rw": weighed,
    "x0_blend": blended,
    "unet": joined,
}
"""What a site makes of its state with its readings as coefficients, by name: the stream after it."""

CLOSES = {
    "backout": lambda state, backout: state[0] - backout * state[1],
    "deep_delta_expanded": lambda state, read: (read * state[0]).sum(-2),
}
"""What a close makes of its state, before the final norm."""


def tensor_of(reading) -> Tensor:
    return next(value for value in vars(reading).values() if isinstance(value, Tensor))


def tensors(readings) -> dict[str, Tensor]:
    return {name: tensor_of(reading) for name, reading in readings.items()}


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def all_readings(model: GPT, **state) -> dict[str, dict]:
    """Of every site and of the close, for random states."""
    found = {f"{index}": site.diagnose(random_state(model, index, **state)) for index, site in sites_of(model)}
    return found | {"close": model.parts[-1].diagnose(random_state(model, 2 * SHAPE.layers, **state))}


def test_every_variant_is_in_one_of_the_tables():
    assert SILENT.keys() | SITES.keys() | CLOSES.keys() | HISTORIES == {name_of(row) for row in ROWS}
    assert not SILENT.keys() & (SITES.keys() | CLOSES.keys() | HISTORIES)


@pytest.mark.parametrize("row", [row for row in ROWS if name_of(row) in SITES], ids=str)
@torch.no_grad()
def test_readings_of_a_site_give_the_stream_after_it(row):
    model, shown = model_with(row), 0
    # A channel's gate is shown as its mean over the tokens: of one token the gate itself.
    tokens = (1, 1) if name_of(row) == "channel_gate" else (2, 3)
    for index, site in sites_of(model):
        state = random_state(model, index, tokens)
        readings = tensors(site.diagnose(state))
        if not readings:
            continue
        sublayers = (F, G) if name_of(row) in ("rezero", "parallel_rescaled") else (F,)
        after, _ = site(state, (), *sublayers)
        expected = SITES[name_of(row)](dict(site.named_parameters()), index, state, **readings)
        assert error(after[0], expected) < 1e-12, index
        shown += 1
    expected = {"x0_blend": SHAPE.layers, "unet": SHAPE.layers // 2}
    assert shown == expected.get(name_of(row), len(sites_of(model)))


@pytest.mark.parametrize("row", [row for row in ROWS if name_of(row) in CLOSES], ids=str)
@torch.no_grad()
def test_readings_of_a_close_give_what_is_closed(row):
    model = model_with(row)
    close, state = model.parts[-1], random_state(model, 2 * SHAPE.layers)
    closed = CLOSES[name_of(row)](state, **tensors(close.diagnose(state)))
    assert error(close(state), layer_norm(closed, dict(close.named_parameters()))) < 1e-12


@pytest.mark.parametrize("row", [row for row in ROWS if name_of(row) in SILENT], ids=str)
@torch.no_grad()
def test_a_variant_with_norms_and_constants_alone_shows_nothing(row):
    model = model_with(row)
    assert not any(all_readings(model).values())
    if name_of(row) != "laurel_lr":
        owned = [name for _, site in sites_of(model) for name, _ in site.named_parameters()]
        owned += [name for name, _ in model.parts[-1].named_parameters()]
        assert all(name.startswith("norm") for name in owned)


class Course:
    """A run of a model: what each sublayer was given and gave, and the state before every site and the close."""

    def __init__(self, model: GPT):
        self.given, self.gave, self.states = {}, {}, defaultdict(tuple)
        model.parts[1].register_forward_hook(lambda module, x, out: self.gave.__setitem__("embed", out[0]))
        for index, site in sites_of(model):
            site.register_forward_pre_hook(lambda module, x, index=index: self.states.__setitem__(index, x[0]))
        for index in range(2 * SHAPE.layers):
            layer = model.parts[2 + index // 2]
            self._follow((layer.attention, layer.mlp)[index % 2], f"{index // 2:02d}.{('attention', 'mlp')[index % 2]}")
        close = model.parts[-1]
        close.register_forward_hook(lambda module, x, out: self.gave.__setitem__("hidden", out))
        close.register_forward_pre_hook(lambda module, x: self.states.__setitem__(2 * SHAPE.layers, x[0]))
        self.hidden = model(IDX[:, :-1])

    def _follow(self, sublayer, name):
        def note(module, x, out):
            self.given[name], self.gave[name] = x[0], out[0] if isinstance(out, tuple) else out

        sublayer.register_forward_hook(note)

    def source(self, name: str, index: int) -> Tensor:
        """What a row over depth before sublayer ``index`` means by a name: the embedding, what a sublayer gave, the sum
        of a run of them as far as it has come, or the stream after a layer."""
        if name in self.gave:
            return self.gave[name]
        if "." not in name:
            return self.states[2 * int(name) + 1][0] + self.gave[f"{name}.mlp"]
        order = [key for key in self.gave if "." in key]
        first, last = (order.index(end) for end in name.split("-"))
        return sum(self.gave[key] for key in order[first : min(last + 1, index)])

    def stream_after(self, name: str, index: int) -> Tensor:
        """Of LAuReL-PA, where the stream enters the next site as the first tensor of the state."""
        order = ["embed", *(key for key in self.gave if "." in key)]
        return self.states[order.index(name)][0]

    def sum_of(self, depth: Depth, index: int, source=None, weights=None) -> Tensor:
        weights = depth.weights if weights is None else weights
        assert weights.shape[-1] == len(depth.sources) == len(set(depth.sources))
        named = [(source or self.source)(name, index) for name in depth.sources]
        return sum(weights[..., j, None] * tensor for j, tensor in enumerate(named))


def sublayer_name(index: int) -> str:
    return f"{index // 2:02d}.{('attention', 'mlp')[index % 2]}"


@pytest.mark.parametrize("row", [row for row in ROWS if "attention_residuals" in row.spec], ids=str)
@torch.no_grad()
def test_a_softmax_over_depth_weighs_what_its_names_say(row):
    model = model_with(row)
    course, factor = Course(model), "scale=sum" in row.spec
    places = [(index, site, course.given[sublayer_name(index)]) for index, site in sites_of(model)]
    for index, site, given in [*places, (2 * SHAPE.layers, model.parts[-1], course.gave["hidden"])]:
        readings = site.diagnose(course.states[index])
        if index == 0 or "delta" in row.spec and index == 2 * SHAPE.layers:
            assert not readings
            continue
        depth = readings["depth"]
        assert (depth.weights.sum(-1) - 1).abs().max() < 1e-12 and depth.weights.min() > 0
        assert depth.weights.shape == (*IDX[:, :-1].shape, len(course.states[index]))
        if "delta" in row.spec:
            weights = 1 + readings["gate"].values * depth.weights
        else:
            weights = depth.weights * (len(depth.sources) if factor else 1)
        assert error(site.norm(course.sum_of(depth, index, weights=weights)), given) < 1e-10, index


@pytest.mark.parametrize("row", [row for row in ROWS if name_of(row) == "dense_former"], ids=str)
@torch.no_grad()
def test_the_averages_of_a_dense_former_weigh_what_their_names_say(row):
    model = model_with(row)
    course, shown = Course(model), 0
    for index, site in sites_of(model):
        for depth in site.diagnose(course.states[index]).values():
            assert error(course.sum_of(depth, index), course.states[index + 1][0]) < 1e-10, index
            shown += 1
    assert shown == {"dense_former": 4, "dense_former(dilation=2, period=2)": 2}.get(row.spec, 1)


@torch.no_grad()
def test_the_ways_of_a_mudd_former_weigh_what_their_names_say():
    model = model_of("mudd_former").eval()
    course = Course(model)
    for layer in range(1, SHAPE.layers):
        index, name = 2 * layer, f"{layer:02d}.attention"
        site = model.parts[2 + layer].sites["attention"]
        readings = site.diagnose(course.states[index])
        assert list(readings) == ["depth_q", "depth_k", "depth_v", "depth_r"]
        *inputs, residual = (course.sum_of(depth, index) for depth in readings.values())
        for given, norm, x in zip(course.given[name], site.norm.values(), inputs, strict=True):
            assert error(given, norm(x)) < 1e-10
        assert error(course.states[index + 1][0], residual + course.gave[name]) < 1e-10
    close = model.parts[-1]
    depth = close.diagnose(course.states[2 * SHAPE.layers])["depth"]
    assert depth.sources == ("embed", "00", "01", "02", "03")
    assert error(close.norm(course.sum_of(depth, 2 * SHAPE.layers)), course.gave["hidden"]) < 1e-10


@pytest.mark.parametrize("row", [row for row in ROWS if name_of(row) == "laurel_pa"], ids=str)
@torch.no_grad()
def test_gammas_weigh_the_streams_after_the_sublayers_of_their_names(row):
    model = model_with(row)
    course = Course(model)
    for index, site in sites_of(model):
        depth, p = site.diagnose(course.states[index])["depth"], dict(site.named_parameters())
        moved = course.sum_of(depth, index, course.stream_after) @ (p["map.B.weight"] @ p["map.A.weight"]).T
        expected = course.states[index][0] + course.gave[sublayer_name(index)] + moved
        assert error(expected, course.states[index + 1][0]) < 1e-10, index


def test_sources_have_the_names_of_the_layers():
    attention, blocks = (
        model_of(spec).parts[3].sites["mlp"].sources
        for spec in ("attention_residuals", "block_attention_residuals(block_size=2)")
    )
    assert attention == ("embed", "00.attention", "00.mlp", "01.attention")
    assert blocks == ("embed", "00.attention-00.mlp", "01.attention-01.mlp")
    closed = model_of("block_attention_residuals").parts[-1].sources
    assert closed == ("embed", "00.attention-02.mlp", "03.attention-03.mlp")
    assert model_of("laurel_pa").parts[3].sites["attention"].sources == ("embed", "00.attention", "00.mlp")
    assert model_of("dense_former(dilation=2)").parts[4].sites["mlp"].sources == ("00", "02")


@pytest.mark.parametrize("spec", ["mhc", "mhc_lite", "mhc(streams=2, init=random)"])
@torch.no_grad()
def test_mixing_on_the_manifold_is_doubly_stochastic_also_under_autocast(spec):
    """Under autocast a product in bf16 would be off by 1e-3. Sinkhorn's columns are so in the limit alone."""
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        model = model_of(spec, dtype=dtype).eval()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            for index, site in sites_of(model):
                matrix = site.diagnose(random_state(model, index, dtype=dtype))["mixing"].matrix
                assert matrix.dtype == dtype and matrix.shape[:2] == (2, 3) and matrix.min() >= 0
                assert (matrix.sum(-1) - 1).abs().max() < bound
                assert (matrix.sum(-2) - 1).abs().max() < (bound if spec == "mhc_lite" else 0.02)


@torch.no_grad()
def test_a_site_is_shown_with_streams_before_it_in_columns_and_after_it_in_rows():
    """A_r[0, 2] = 1 adds stream 0 to stream 2."""
    site = model_of("hyper_connections(dynamic=false)", away=0).parts[2].sites["attention"]
    site.A_r[0, 2] = 1.0
    expected = torch.eye(4, dtype=torch.float64)
    expected[2, 0] = 1.0
    assert torch.equal(site.diagnose((torch.zeros(1, 1, 4, SHAPE.width),))["mixing"].matrix, expected)


@torch.no_grad()
def test_the_gate_of_a_channel_is_its_mean_over_the_tokens():
    model = model_of("channel_gate").eval()
    site = model.parts[2].sites["attention"]
    (x,) = random_state(model, 0)
    each = [site.diagnose((token[None, None],))["gate"].values for token in x.flatten(0, 1)]
    assert error(site.diagnose((x,))["gate"].values, sum(each) / len(each)) < 1e-12


@torch.no_grad()
def test_multipliers_of_pro_res_are_those_of_the_step():
    """min(t / (T l), 1) at step 3 of T = 2."""
    model = model_of("pro_res(warmup=2)", step=3)
    found = [site.diagnose(())["gate"].values.item() for _, site in sites_of(model)]
    assert found == [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.375, 0.375]


@pytest.mark.parametrize("row", ONE_OF_EACH, ids=str)
def test_readings_change_nothing_and_are_small_copies_without_gradients(row):
    model = model_with(row, torch.float32)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    random = torch.get_rng_state()
    for index, site in sites_of(model):
        state = random_state(model, index, dtype=torch.float32)
        before = [tensor.clone() for tensor in state]
        site.diagnose(state)
        assert all(map(torch.equal, state, before))
    found = all_readings(model, tokens=(2, 8), dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())
    shown = [tensor for readings in found.values() for tensor in tensors(readings).values()]
    kept = [tensor.clone() for tensor in shown]
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    for tensor, copy in zip(shown, kept):
        assert torch.equal(tensor, copy)
        assert not tensor.requires_grad and tensor.dtype == torch.float32
        assert tensor.numel() < 2 * 8 * SHAPE.width  # less than one tensor of the stream


@pytest.mark.parametrize("row", ONE_OF_EACH, ids=str)
@torch.no_grad()
def test_readings_under_autocast_are_those_of_fp32_but_for_the_rounding_of_products(row):
    model = model_with(row, torch.float32)
    exact = all_readings(model, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = all_readings(model, dtype=torch.float32)
    for place, readings in exact.items():
        assert rounded[place].keys() == readings.keys()
        for name, expected in tensors(readings).items():
            assert error(tensor_of(rounded[place][name]), expected) < 0.02, (place, name)


@pytest.mark.parametrize("kind", [Values, Mixing, lambda tensor: Depth(tensor, ("embed", "00"))])
def test_readings_are_fp32_or_wider(kind):
    kept = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    for dtype, wide in kept.items():
        assert tensor_of(kind(torch.zeros(2, 2, dtype=dtype, requires_grad=True))).dtype == wide
