"""Wrapped layers: with layers of the test in place of fla's, which need no GPU, and fla's own where it is installed."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from interpreter import MISSING, REASON, Interpreter
from small_models import IDX, SHAPE, loss_of, model_of
from torch import nn

from megaresid.attention import fla_layer
from megaresid.attention.fla_layer import FlaLayer, Options, arguments_of, check_layer, layer_class, uses_scalar_gates
from megaresid.attention.kernels.routes import Facts
from megaresid.attention.mixer import MIXERS
from megaresid.errors import UserError
from megaresid.model.check import check_states
from megaresid.model.flops import forward_flops_per_token
from megaresid.model.gpt import GPT, build, canonical_parameters, canonical_rules
from megaresid.model.plan import ModelPlan
from megaresid.spec import parse_pattern

GOOD = Facts(hopper=False, triton="3.9.0", fla="0.6.0")


class Tensors(nn.Module):
    """Returns a tensor, as BasedLinearAttention does."""

    def __init__(self, hidden_size: int = 1024, num_heads: int = 12, head_dim: int = 256, scale: float = 1.0, **kwargs):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {hidden_size}")
        self.scale, self.sizes = scale, (num_heads, head_dim)
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.dt_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.A_log = nn.Parameter(torch.rand(num_heads, hidden_size).log())
        self.A_log._no_weight_decay = True
        self.conv1d = nn.Conv1d(hidden_size, hidden_size, 3, groups=hidden_size, bias=False)
        nn.init.constant_(self.dt_proj.bias, 3.0)
        self.dt_proj.bias._no_reinit = True

    def forward(self, hidden_states, attention_mask=None, past_key_values=None):
        return self.scale * self.o_proj(self.q_proj(hidden_states).cumsum(1))


class Triples(Tensors):
    """Returns (o, None, cache), as most layers do."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states), None, None


class Firsts(nn.Module):
    """Takes and returns the first layer's values, as RWKV7Attention does, with an initialisation of its own."""

    def __init__(self, hidden_size: int = 8, value_dim: int | None = None, layer_idx=None, num_hidden_layers=None):
        super().__init__()
        self.layer_idx, self.value_dim = layer_idx, value_dim or hidden_size
        self.v_proj = nn.Linear(hidden_size, self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.value_dim, hidden_size, bias=False)
        self.apply(self._initialize_weights)

    def _initialize_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)

    def forward(self, hidden_states, v_first=None):
        v = self.v_proj(hidden_states)
        v_first = v if self.layer_idx == 0 else v_first
        return self.o_proj(v + v_first), None, None, v_first


class YOCOSharedKVBuilder(nn.Module):
    pass


@pytest.fixture
def stand_in(monkeypatch):
    """fla.layers with the layers above, and a check that asks for no GPU."""
    module = ModuleType("fla.layers")
    for cls in (Tensors, Triples, Firsts, YOCOSharedKVBuilder):
        setattr(module, cls.__name__, cls)
    module.__all__ = [name for name in vars(module) if name[0].isupper()]
    monkeypatch.setitem(sys.modules, "fla.layers", module)
    monkeypatch.setattr(FlaLayer, "check", lambda shape, options: check_layer(shape, options))


def options_of(text: str) -> Options:
    return MIXERS.resolve(parse_pattern(text).terms[0][1])[1]


def test_on_a_machine_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"fla\(HGRNAttention\) runs on a GPU, and there is none here: choose a mixer"):
        ModelPlan(SHAPE, "fla(HGRNAttention, expand_ratio=1)")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (GOOD._replace(fla=None), r"fla\(HGRNAttention\) needs fla-core .* there is no fla-core: pip install"),
        (GOOD._replace(fla="0.5.2"), "fla-core 0.5.2 computes wrong gradients"),
        (GOOD, r"cannot import fla\.layers .*: pip install"),
    ],
)
def test_without_the_library_it_is_refused(monkeypatch, facts, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fla_layer, "facts_of", lambda device: facts)
    monkeypatch.setitem(sys.modules, "fla.layers", None)
    with pytest.raises(UserError, match=message):
        FlaLayer.check(SHAPE, Options(layer="HGRNAttention"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fla(Tensor)", "unknown layer 'Tensor': did you mean 'Tensors'"),
        ("fla(Tensors, scales=2.0)", "has no option 'scales': did you mean 'scale'"),
        ("fla(Tensors, hidden_size=8)", "has no option 'hidden_size'"),
        ("fla(Tensors, num_heads=3)", "cannot be built for width 32: 3 heads do not divide 32: change its options"),
        ("fla(YOCOSharedKVBuilder)", "is a part of another"),
        ("fla(Tensors, scale=gla(expand_k=0.5))", "scale"),
    ],
)
def test_what_the_layer_has_not_is_refused(stand_in, spec, message):
    """An option that its ``**kwargs`` would swallow too."""
    with pytest.raises(UserError, match=message):
        ModelPlan(SHAPE, spec)


def test_on_hopper_a_bad_triton_never_runs_a_layer_with_scalar_gates(monkeypatch):
    """What a layer's file imports says which kernels it has."""
    module = ModuleType("fla.layers")
    module.Tensors, module.__all__ = Tensors, ["Tensors"]
    monkeypatch.setitem(sys.modules, "fla.layers", module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    operator = ModuleType("chunk_comba")
    operator.__module__ = "fla.ops.comba.chunk"
    for facts, gated, refused in (
        (GOOD._replace(hopper=True, triton="3.6.0"), True, True),
        (GOOD._replace(hopper=True, triton="3.6.0"), False, False),
        (GOOD._replace(hopper=True, triton="3.7.1"), True, False),
    ):
        monkeypatch.setattr(fla_layer, "facts_of", lambda device, facts=facts: facts)
        monkeypatch.setitem(globals(), "chunk_comba", operator if gated else None)
        if refused:
            with pytest.raises(UserError, match='Triton 3.6.0 gets wrong on Hopper: .* pip install "triton>=3.7.1"'):
                FlaLayer.check(SHAPE, Options(layer="Tensors"))
        else:
            FlaLayer.check(SHAPE, Options(layer="Tensors"))


def test_one_layer_is_too_few_for_first_values(stand_in):
    with pytest.raises(UserError, match="for 2 layers or more"):
        ModelPlan(SHAPE.model_copy(update={"layers": 1}), "fla(Firsts)")


def test_documents_are_refused(stand_in):
    with pytest.raises(UserError, match="'fla' cannot keep documents apart"):
        ModelPlan(SHAPE.model_copy(update={"end_of_text": 0}), "fla(Tensors)", documents=True)


def test_the_model_gives_its_sizes(stand_in):
    assert arguments_of(Tensors, SHAPE, options_of("fla(Tensors)"), 3) == {
        "hidden_size": 32,
        "num_heads": 2,
        "head_dim": 16,
    }
    written = arguments_of(Tensors, SHAPE, options_of("fla(Tensors, num_heads=4, scale=0.5)"), 3)
    assert written == {"hidden_size": 32, "num_heads": 4, "head_dim": 8, "scale": 0.5}
    assert arguments_of(Firsts, SHAPE, options_of("fla(Firsts)"), 3) == {
        "hidden_size": 32,
        "layer_idx": 3,
        "num_hidden_layers": 4,
    }


@pytest.mark.parametrize("name", ["Tensors", "Triples"])
def test_the_output_is_the_layers(stand_in, name):
    mixer = FlaLayer(SHAPE, options_of(f"fla({name}, scale=0.5)"), 0)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    output, side = mixer(x, (x,))
    assert side == (x,)
    expected = 0.5 * mixer.layer.o_proj(mixer.layer.q_proj(x).cumsum(1))
    torch.testing.assert_close(output, expected)


def test_first_values_go_on_to_later_layers(stand_in):
    """Through a layer between, and to one that is not next; the first of them is number 0 wherever it stands."""
    shape = SHAPE.model_copy(update={"layers": 5})
    plan = ModelPlan(shape, "softmax | fla(Firsts, value_dim=24) + softmax + fla(Firsts, value_dim=24) | softmax")
    assert [plan.side_spec(layer) for layer in range(6)] == [(), (), *[(("v_first", (24,)),)] * 2, (), ()]
    mixers = [plan.mixer_of(layer) for layer in (1, 3)]
    assert [mixer.layer.layer_idx for mixer in mixers] == [0, 3]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    _, (first,) = mixers[0](x, ())
    torch.testing.assert_close(first, mixers[0].layer.v_proj(x))
    output, side = mixers[1](x, (first,))
    torch.testing.assert_close(output, mixers[1].layer.o_proj(mixers[1].layer.v_proj(x) + first))
    assert side == (first,)


def test_promises_are_kept_on_fake_tensors(stand_in):
    """As before a training, where no kernel can run."""
    check_states(ModelPlan(SHAPE, "fla(Firsts, value_dim=24) + softmax + fla(Tensors)"))


def test_a_model_of_them_trains(stand_in):
    model = model_of("vanilla", attention="fla(Firsts) + fla(Tensors)", away=0.0, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, IDX)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_a_compiler_leaves_the_layers_call_out(stand_in):
    model = model_of("vanilla", attention="fla(Firsts) + fla(Tensors)", dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(loss_of(compiled, IDX), loss_of(model, IDX))
    assert not model.plan.one_graph(torch.device("cpu"), torch.float32)


def parameters_of(spec: str, seed: int) -> dict[str, torch.Tensor]:
    model = build(ModelPlan(SHAPE, spec), seed)
    return {name: p.detach() for name, p in canonical_parameters(model, model.prefixes).items()}


def test_initial_values_and_rules(stand_in):
    """Plain Linears as GPT-2's, the rest as constructed; a marked parameter does not decay and stays in fp32."""
    found = parameters_of("fla(Tensors)", seed=0)
    place = "layers.01.attention.layer."
    layer = {name.removeprefix(place): value for name, value in found.items() if name.startswith(place)}
    assert 0.018 < layer["q_proj.weight"].std() < 0.022 and not layer["q_proj.bias"].any()
    assert 0.018 / 8**0.5 < layer["o_proj.weight"].std() < 0.022 / 8**0.5
    assert (layer["dt_proj.bias"] == 3).all()
    assert (layer["dt_proj.weight"].abs() <= 32**-0.5).all() and layer["dt_proj.weight"].std() > 0.08  # nn.Linear's own
    assert (layer["A_log"] < 0).all() and layer["A_log"].unique().numel() == layer["A_log"].numel()
    model = GPT(plan := ModelPlan(SHAPE, "fla(Tensors)"))
    rules = canonical_rules(model, model.prefixes, plan)
    rules = {name.removeprefix(place): rule for name, rule in rules.items()}
    decaying = {name for name in layer if rules[name].decay}
    assert decaying == {"q_proj.weight", "dt_proj.weight", "o_proj.weight", "conv1d.weight"}
    assert {name for name in layer if rules[name].fp32} == {"A_log"}
    assert str(rules["A_log"].start) == "as constructed"


def test_a_layers_own_initialisation_is_kept(stand_in):
    found = parameters_of("fla(Firsts)", seed=0)
    for layer in ("00", "03"):
        for name in ("v_proj", "o_proj"):
            weight = found[f"layers.{layer}.attention.layer.{name}.weight"]
            torch.testing.assert_close(weight @ weight.T, torch.eye(32))


def test_initial_values_are_the_seeds(stand_in):
    """The same for the same seed whatever was drawn before, others for another seed and in another layer."""
    one, other = parameters_of("fla(Tensors)", seed=0), parameters_of("fla(Tensors)", seed=1)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    model = build(plan := ModelPlan(SHAPE, "fla(Tensors)"), seed=0)
    torch.set_rng_state(state)
    again = canonical_parameters(model, model.prefixes)
    name = "layers.{:02d}.attention.layer.A_log"
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one[name.format(0)], other[name.format(0)])
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    rules = canonical_rules(model, model.prefixes, plan)
    rules[name.format(0)].start.draw(one[name.format(0)].shape, torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state), "nothing else's numbers change"


def test_flops_are_those_of_its_matrices(stand_in):
    """2 for each entry: two square matrices and that of the output, A_log, which has two dimensions, and the kernel."""
    expected = 4 * 2 * (3 * 32 * 32 + 2 * 32 + 3 * 32)
    assert forward_flops_per_token(ModelPlan(SHAPE, "fla(Tensors)"))["attention"] == expected


real = [pytest.mark.full, pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason=REASON)]
NAMED = ["RWKV7Attention", "GatedSlotAttention", "BasedLinearAttention", "ReBasedLinearAttention", "Mamba2",
         "HGRNAttention"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=real) for name in NAMED])
def test_flas_own_layers_are_built_and_filled(monkeypatch, name):
    """Every parameter has its rule, marks are read, and RWKV-7's values are those of its constructor."""
    monkeypatch.setattr(FlaLayer, "check", lambda shape, options: check_layer(shape, options))
    shape = SHAPE.model_copy(update={"width": 128, "layers": 3})
    model = build(plan := ModelPlan(shape, f"fla({name})"), seed=0)
    rules = canonical_rules(model, model.prefixes, plan)
    layer = model.parts[3].attention.layer
    constructed = layer_class(name)(**arguments_of(layer_class(name), shape, Options(layer=name), 1))
    assert type(layer) is type(constructed)
    marks = {key for key, p in constructed.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marks == {key for key, _ in layer.named_parameters() if rules[f"layers.01.attention.layer.{key}"].fp32}
    assert (name == "Mamba2") == bool(marks)
    if name == "RWKV7Attention":
        assert layer.layer_idx == 1 and model.parts[2].attention.layer.layer_idx == 0
        for key in ("x_r", "k_k", "r_k", "w_lora.lora.2.bias", "g_norm.weight", "o_proj.weight"):
            assert torch.equal(layer.get_parameter(key), constructed.get_parameter(key)), key
        weight = layer.r_proj.weight.detach()
        torch.testing.assert_close(weight @ weight.T, torch.eye(128))
    else:
        output = layer.out_proj if name == "Mamba2" else layer.o_proj
        assert 0.9 < output.weight.std() * 6**0.5 / 0.02 < 1.1


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason=REASON)
def test_which_of_flas_layers_have_scalar_gates():
    """Those whose backward pass fla itself refuses on Hopper with a bad Triton, and none of the others."""
    gated = {"GatedDeltaNet", "Comba", "PrecondGatedDeltaNet", "GatedDeltaProduct"}
    others = {"KimiDeltaAttention", "DeltaNet", "GatedLinearAttention", "LinearAttention", "HGRN2Attention", *NAMED}
    assert {name for name in gated | others if uses_scalar_gates(layer_class(name))} == gated


def outputs_of(name: str) -> float:
    """In the interpreter: how far two wrapped layers of a model are from fla's own layers, called as fla's users do."""
    shape = SHAPE.model_copy(update={"width": 64, "layers": 2})
    options = Options(layer=name)
    mixers = [FlaLayer(shape, options, 0, ()), FlaLayer(shape, options, 1, FlaLayer.side_spec(shape, options, ()))]
    x = torch.randn(1, 65, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for mixer in mixers:
            for parameter in mixer.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        first, side = mixers[0](x, ())
        second, _ = mixers[1](first, side)
        found = mixers[0].layer(x)
        if isinstance(found, torch.Tensor):
            expected = mixers[1].layer(found)
        elif len(found) == 4:
            expected = mixers[1].layer(found[0], v_first=found[3])[0]
        else:
            expected = mixers[1].layer(found[0])[0]
    assert expected.isfinite().all() and expected.std() > 1e-4
    return (second - expected).abs().max().item()


@pytest.mark.full
@pytest.mark.skipif(bool(MISSING), reason=REASON)
def test_flas_returns_are_honoured():
    """A tensor, a triple, and RWKV-7's four with the first layer's values."""
    interpreter = Interpreter()
    try:
        for name in ("BasedLinearAttention", "GatedLinearAttention", "RWKV7Attention"):
            assert interpreter.run(outputs_of, name) == 0, name
    finally:
        interpreter.close()
