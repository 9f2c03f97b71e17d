"""Scores of targets against their definition: all logits, their log-softmax in fp64, and its largest entry."""

import pytest
import torch
from small_models import IDX, SHAPE, model_of

from megaresid.model import loss as module
from megaresid.model.loss import full_logits
from megaresid.model.scores import target_scores

VOCABULARY, PADDED, WIDTH = 37, 48, 6
BF16_ROUNDOFF = 2.0**-8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK_TOKENS", 4)


def definition(hidden, weight, targets):
    """Position by position; of several targets of one position one after the other."""
    logits = full_logits(hidden, weight, VOCABULARY)
    log_p = torch.log_softmax(logits.double(), -1)
    targets = targets[..., None] if targets.ndim < hidden.ndim else targets
    found = []
    for position in torch.cartesian_prod(*map(torch.arange, hidden.shape[:-1])).view(-1, hidden.ndim - 1).tolist():
        place, asked = tuple(position), targets[tuple(position)].tolist()
        likeliest = next(i for i in range(VOCABULARY) if logits[place][i] == logits[place].max())
        found += [(log_p[place][target].item(), likeliest == target) for target in asked if target >= 0]
    log_p, greedy = zip(*found) if found else ((), ())
    return torch.tensor(log_p, dtype=torch.float64), torch.tensor(greedy, dtype=torch.bool)


def inputs(*shape, dtype=torch.float64, wanted=0.6, several=0, seed=0):
    """Every other wanted target is the likeliest one."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    likeliest = full_logits(hidden.double(), weight.double(), VOCABULARY).argmax(-1)
    if several:
        shape, likeliest = (*shape, several), likeliest[..., None]
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    targets = torch.where(torch.rand(shape, generator=generator) < 0.5, targets, likeliest)
    targets[torch.rand(shape, generator=generator) >= wanted] = -1
    return hidden, weight, targets


def assert_scores(ours, expected, tolerance):
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=tolerance, atol=tolerance)
    assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("shape", [(1,), (4,), (5,), (9,), (2, 7), (2, 3, 2)])
@pytest.mark.parametrize("wanted", [0.3, 1.0])
@pytest.mark.parametrize("several", [0, 1, 3])
def test_scores_are_the_definition_in_row_major_order(shape, wanted, several):
    case = inputs(*shape, wanted=wanted, several=several)
    expected = definition(*case)
    if case[2].numel() > 8:
        assert expected[1].any() and not expected[1].all()
    log_p, greedy = target_scores(*case, VOCABULARY)
    assert log_p.dtype == torch.float64
    assert_scores((log_p, greedy), expected, 1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 1)])
def test_nothing_wanted_gives_nothing(shape):
    log_p, greedy = target_scores(*inputs(*shape, dtype=torch.float32, wanted=0), VOCABULARY)
    assert log_p.shape == greedy.shape == (0,)
    assert (log_p.dtype, greedy.dtype) == (torch.float32, torch.bool)


@pytest.mark.parametrize("padding", [1e3, torch.inf, torch.nan])
def test_padding_rows_are_neither_in_the_softmax_nor_the_likeliest(padding):
    hidden, weight, targets = inputs(9)
    expected = target_scores(hidden, weight, targets, VOCABULARY)
    weight[VOCABULARY:] = padding
    assert all(map(torch.equal, target_scores(hidden, weight, targets, VOCABULARY), expected))


def test_of_equal_logits_the_first_is_the_likeliest():
    hidden, weight, _ = inputs(1)
    hidden, weight[[3, 8, 20]] = hidden.expand(3, -1), 9 * hidden
    log_p, greedy = target_scores(hidden, weight, torch.tensor([3, 8, 20]), VOCABULARY)
    assert greedy.tolist() == [True, False, False] and len(set(log_p.tolist())) == 1


@pytest.mark.parametrize("scale", [1e4, 1e-30])
def test_extreme_logits(scale):
    """In fp32, against the log-softmax of the same fp32 logits: a sum of exponentials would be infinite or lose all."""
    hidden, weight, targets = inputs(40, dtype=torch.float32)
    hidden = hidden * scale
    assert_scores(target_scores(hidden, weight, targets, VOCABULARY), definition(hidden, weight, targets), 2e-6)


def test_an_infinite_or_undefined_logit_spoils_its_own_position_only():
    hidden, weight, targets = inputs(5, wanted=1)
    expected = target_scores(hidden, weight, targets, VOCABULARY)[0]
    hidden[1], hidden[3] = torch.nan, torch.inf
    log_p = target_scores(hidden, weight, targets, VOCABULARY)[0]
    assert log_p.isnan().tolist() == [False, True, False, True, False]
    assert torch.equal(log_p[::2], expected[::2])


def test_fp32_follows_the_definition_to_its_rounding():
    hidden, weight, targets = inputs(60, dtype=torch.float32)
    ours = target_scores(hidden, weight, targets, VOCABULARY)
    assert ours[0].dtype == torch.float32
    # A logit of at most 20 carries WIDTH roundings of 2^-24 of it: 7e-6 absolute.
    assert_scores(ours, definition(hidden.double(), weight.double(), targets), 1e-5)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_products_are_rounded_once_and_the_softmax_is_in_fp32(hidden_dtype, weight_dtype):
    hidden, weight, targets = inputs(60, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.float32 in (hidden_dtype, weight_dtype)):
        log_p, greedy = target_scores(hidden.to(hidden_dtype), weight.to(weight_dtype), targets, VOCABULARY)
    assert log_p.dtype == torch.float32
    rounded = (hidden.float() @ weight.float().T).bfloat16()[:, :VOCABULARY].double()  # WIDTH products: exact in fp32
    expected = definition(rounded, torch.eye(VOCABULARY, dtype=torch.float64), targets)
    assert_scores((log_p, greedy), expected, 2e-6)


def test_autocast_leaves_fp64_alone():
    case = inputs(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_scores(target_scores(*case, VOCABULARY), definition(*case), 1e-12)


def largest_allocation(function) -> int:
    """The most bytes that one operation inside ``function``, at any depth, took and kept for its result."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_logits_exist_at_wanted_positions_only_and_a_block_at_a_time():
    padded, positions = 4096, 512
    hidden, weight = torch.randn(positions, WIDTH), torch.randn(padded, WIDTH)
    targets = torch.randint(padded, (positions,))
    block = 4 * 4 * padded
    assert largest_allocation(lambda: full_logits(hidden, weight, padded)) >= 4 * positions * padded
    assert block <= largest_allocation(lambda: target_scores(hidden, weight, targets, padded)) <= 2 * block
    targets[1:] = -1
    assert largest_allocation(lambda: target_scores(hidden, weight, targets, padded)) <= block // 2


def test_no_gradient_is_kept():
    hidden, weight, targets = inputs(5)
    log_p, _ = target_scores(hidden.requires_grad_(), weight.requires_grad_(), targets, VOCABULARY)
    assert not log_p.requires_grad


@pytest.mark.parametrize("several", [0, 2])
def test_a_model_scores_as_its_logits_say(several):
    model = model_of("vanilla").eval()
    idx = IDX[:, :8]
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(-20, SHAPE.vocab_size, (*idx.shape, several or 1), generator=generator)
    log_p = torch.log_softmax(model(idx)[0], -1)
    places = [tuple(place) for place in (targets >= 0).nonzero().tolist()]
    expected = torch.stack([log_p[row, position, targets[row, position, k]] for row, position, k in places])
    ours = model(idx, targets if several else targets[..., 0], scores=True)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(8,), (9, 1, 1), (1, 9)])
def test_what_does_not_fit_is_refused(shape):
    hidden, weight, _ = inputs(9)
    with pytest.raises(ValueError, match="do not fit"):
        target_scores(hidden, weight, torch.zeros(shape, dtype=torch.int64), VOCABULARY)


def test_what_the_loss_refuses_is_refused():
    hidden, weight, targets = inputs(9)
    with pytest.raises(TypeError, match="must be equal"):
        target_scores(hidden.float(), weight, targets, VOCABULARY)
    with pytest.raises(TypeError, match="float16"):
        target_scores(hidden.half(), weight.half(), targets, VOCABULARY)
