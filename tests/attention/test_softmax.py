"""Softmax attention: what its table row cannot show."""

import pytest
import torch
from define_softmax import softmax as define
from mixer_models import Mixers, inputs
from mixer_row import Row
from torch.utils._python_dispatch import TorchDispatchMode

from megaresid.attention.cache import Cache
from megaresid.attention.causal_attention import causal_attention
from megaresid.attention.mixer import MIXERS
from megaresid.attention.rotary import rotate
from megaresid.errors import UserError
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.spec import parse_pattern

SHAPE = ModelShape(layers=1, heads=4, width=32, context=24, vocab_size=40)


def mixers_of(spec: str, dtype: torch.dtype = torch.float64) -> Mixers:
    return Mixers(Row(spec, define()), dtype=dtype)


class Operations(TorchDispatchMode):
    """Every operation that computes, with the largest result in bytes."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name.removeprefix("aten::"))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        self.largest = max(self.largest, *(t.nbytes for t in tensors if isinstance(t, torch.Tensor)))
        return result


def test_the_default_is_four_products_and_one_fused_kernel():
    """Nothing that an option adds is left behind where it is not asked for."""
    mixers, x = mixers_of("softmax"), inputs(Row("softmax", define()))
    with Operations() as operations:
        mixers.mixers[0](x.requires_grad_(), ())
    computing = [name for name in operations.names if name not in ("t", "view", "transpose", "_unsafe_view", "detach")]
    assert computing == ["addmm"] * 3 + ["_scaled_dot_product_flash_attention_for_cpu", "addmm"]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def by_mask(q, k, v, window, segment):
    """The scores of all pairs, and infinity where a token does not see another."""
    token = torch.arange(q.shape[2])
    back = token[:, None] - token
    unseen = (back < 0) | (back >= window)
    if segment is not None:
        unseen = (unseen | (segment[:, :, None] != segment[:, None, :]))[:, None]
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(unseen, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("length", [6, 7, 12, 23, 24])
@pytest.mark.parametrize("window", [1, 3, 5])
def test_a_window_in_blocks_is_a_masked_square(length, window, documents):
    """Outputs and gradients, at lengths that the window does and does not divide, on both sides of two windows."""
    q, k, v = (drawn(2, 3, length, 4, seed=seed) for seed in range(3))
    segment = torch.arange(2 * length).reshape(2, length).div(5, rounding_mode="floor").int() if documents else None
    found, expected = causal_attention(q, k, v, window, segment), by_mask(q, k, v, window, segment)
    weights = drawn(*found.shape, seed=4)
    assert (found - expected).abs().max() < 1e-13
    for gradient, want in zip(*(torch.autograd.grad((weights * o).sum(), (q, k, v)) for o in (found, expected))):
        assert (gradient - want).abs().max() < 1e-12


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
def test_a_window_takes_memory_in_proportion_to_the_text(documents):
    """Forward and backward; the square of 2,000 tokens would be 4 MB even at a byte a pair."""
    largest = []
    for length in (1000, 2000):
        q, k, v = (drawn(1, 1, length, 4, seed=seed) for seed in range(3))
        segment = torch.zeros(1, length, dtype=torch.int32) if documents else None
        with Operations() as operations:
            causal_attention(q, k, v, 16, segment).sum().backward()
        largest.append(operations.largest)
    assert largest[1] == pytest.approx(2 * largest[0], rel=0.02) and largest[1] < 2_000_000


def test_a_window_as_long_as_the_text_is_none():
    x = inputs(Row("softmax", define()))
    whole = mixers_of("softmax")(x)
    assert torch.equal(mixers_of("softmax(window=11)")(x), whole)
    assert not torch.equal(mixers_of("softmax(window=10)")(x), whole)


@pytest.mark.parametrize("window", [None, 7, 30], ids=["kernel", "blocks", "mask"])
def test_in_training_and_only_there_weights_are_dropped(window):
    """All scores are 0 and all values 1: an output is 1 / (1 - p) times the share of the tokens seen that is left."""
    shape, length = SHAPE.model_copy(update={"dropout": 0.3}), 40
    mixer = ModelPlan(shape, f"softmax(window={window or 'none'})").mixer_of(0).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.v_proj.bias.fill_(1)
        mixer.o_proj.weight.copy_(torch.eye(32))
    x = torch.zeros(16, length, 32, dtype=torch.float64)
    torch.manual_seed(0)
    first, second = mixer(x, ())[0], mixer(x, ())[0]
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    seen = torch.arange(1, length + 1).clamp(max=window or length)[None, :, None]
    left = first[..., :: 32 // 4] * 0.7 * seen  # a head's channels share its weights
    assert (left - left.round()).abs().max() < 1e-9
    count = 16 * 4 * seen.sum()
    assert abs(left.sum() / count - 0.7) < 5 * (0.3 * 0.7 / count) ** 0.5
    assert (mixer.eval()(x, ())[0] - 1).abs().max() < 1e-12


def test_rotated_products_depend_on_the_distance_alone():
    q, k = drawn(1, 1, 3, 8, seed=0), drawn(1, 1, 3, 8, seed=1)  # one token, three heads
    at = [(rotate(q, torch.tensor([t]), 100.0) * rotate(k, torch.tensor([s]), 100.0)).sum(-1) for t, s in DISTANCES]
    assert all((product - at[0]).abs().max() < 1e-12 for product in at[:3])
    assert (at[3] - at[0]).abs().min() > 1e-3
    assert torch.equal(rotate(q, torch.tensor([0])), q)


DISTANCES = [(5, 2), (3, 0), (1003, 1000), (6, 2)]


def test_rotation_under_bf16_autocast_knows_distant_tokens_apart():
    """In bf16 the positions 1000 and 1001 are one number: the error is that of rounding the result once."""
    x = drawn(1, 2, 1, 8, seed=0).detach().bfloat16()
    positions = torch.tensor([1000, 1001])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rotate(x, positions)
    exact = rotate(x.double(), positions)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize("window", [None, 5])
def test_with_shared_keys_rotation_and_norms_it_is_qwen3s_attention(window):
    """Hugging Face's module with the same weights; sinks, scaling and interleaving would all be seen."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config, Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    theirs = Qwen3Attention(config, 0).double().eval()
    spec = f"softmax(kv_heads=2, positions=rope, rope_theta=500, qk_norm=true, bias=false, window={window or 'none'})"
    ours = ModelPlan(SHAPE, spec).mixer_of(0).double()
    with torch.no_grad():
        for index, parameter in enumerate(theirs.parameters()):
            parameter.copy_(0.5 * drawn(*parameter.shape, seed=index) + (parameter.dim() == 1))
    ours.load_state_dict(theirs.state_dict())
    x = drawn(2, 24, 32, seed=9)
    back = torch.arange(24)[:, None] - torch.arange(24)
    unseen = (back < 0) | (back >= (window or 24))
    mask = torch.zeros(24, 24, dtype=torch.float64).masked_fill(unseen, float("-inf"))[None, None]
    angles = Qwen3RotaryEmbedding(config)(x, torch.arange(24)[None])  # in fp32
    expected, _ = theirs(x, angles, mask)
    assert (ours(x, ())[0] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_bias_and_shared_keys_are_as_many_parameters_as_they_should_be():
    def count(spec):
        return sum(p.numel() for p in ModelPlan(SHAPE, spec).mixer_of(0).parameters())

    assert count("softmax") == 4 * 32**2 + 4 * 32
    assert count("softmax(bias=false)") == 4 * 32**2
    assert count("softmax(kv_heads=2, bias=false)") == 2 * 32**2 + 2 * 32 * 16
    assert count("softmax(kv_heads=1, qk_norm=true)") == 2 * 32**2 + 2 * 32 * 8 + 2 * 32 + 2 * 8 + 2 * 8


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("softmax(heads=3)", "attention 'softmax': heads=3 does not divide width 32: change one"),
        ("softmax(kv_heads=3)", "attention 'softmax': kv_heads=3 does not divide heads 4: change one"),
        ("softmax(heads=32, positions=rope)", "attention 'softmax': positions=rope turns pairs, and a head's width"),
        ("softmax(kv_heads=0)", "attention 'softmax': kv_heads=0 is not valid"),
        ("softmax(window=0)", "attention 'softmax': window=0 is not valid"),
        ("softmax(rope_theta=0)", "attention 'softmax': rope_theta=0 is not valid"),
        ("softmax(positions=alibi)", "attention 'softmax': positions=alibi is not valid"),
        ("softmax(windows=4)", "attention 'softmax' has no option 'windows': did you mean 'window'?"),
        ("value_residual(kv_heads=3)", "attention 'value_residual': kv_heads=3 does not divide heads 4: change one"),
        ("value_residual + value_residual(kv_heads=1)", "attention 'value_residual': the first layer has 4 heads of"),
        (
            "value_residual(heads=2, kv_heads=1) + value_residual(kv_heads=2)",
            "attention 'value_residual': the first layer has 1 heads of values, 16 wide, and a later one 2, 8 wide: ",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(spec, said):
    with pytest.raises(UserError) as caught:
        ModelPlan(SHAPE.model_copy(update={"layers": 2}), spec)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("positions", "needs"), [("learned", True), ("rope", False), ("none", False)])
def test_only_learned_positions_are_asked_of_the_model(positions, needs):
    ((_, component),) = parse_pattern(f"softmax(positions={positions})").terms
    cls, options = MIXERS.resolve(component)
    assert cls.needs_positions(options) == needs == ModelPlan(SHAPE, str(component)).has_positions


def test_a_text_longer_than_its_cache_is_refused():
    mixer, x = ModelPlan(SHAPE, "softmax").mixer_of(0), torch.randn(1, 3, 32)
    cache = Cache(5)
    mixer(x, (), cache)
    with pytest.raises(ValueError, match="made for 5 tokens, and this call ends at token 6"):
        mixer(x, (), cache)
