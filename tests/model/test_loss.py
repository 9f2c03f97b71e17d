"""The loss against its definition: an explicit log-softmax in fp64, indexed, with autograd's own gradients."""

import pytest
import torch

from megaresid.model import loss as module
from megaresid.model.loss import full_logits, linear_cross_entropy

VOCABULARY, PADDED, WIDTH = 37, 48, 6
BF16_ROUNDOFF = 2.0**-8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "CPU_BLOCK_TOKENS", 4)


def definition(hidden, weight, targets, vocab_size):
    logits = hidden @ weight[:vocab_size].T
    top = logits.detach().amax(-1, keepdim=True)
    log_p = logits - top - (logits - top).exp().sum(-1, keepdim=True).log()
    total = sum(-log_p[place][targets[place]] for place in zip(*torch.nonzero(targets >= 0, as_tuple=True)))
    return total / targets.numel()


def inputs(*shape, dtype=torch.float64, ignored=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(PADDED, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, shape, generator=generator)
    targets.view(-1)[list(ignored)] = -1
    return hidden, weight, targets


def gradients(function, hidden, weight, targets, scale=1.0):
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    value = function(hidden, weight, targets, VOCABULARY)
    (value * scale).backward()
    return value.detach(), hidden.grad, weight.grad


def assert_same(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (5,), (8,), (9,), (2, 7), (2, 3, 2)])
@pytest.mark.parametrize("scale", [1.0, -2.5])
def test_value_and_gradients_are_the_definition(shape, scale):
    case = inputs(*shape)
    assert_same(gradients(linear_cross_entropy, *case, scale), gradients(definition, *case, scale), 1e-12)


@pytest.mark.parametrize("ignored", [(0,), (4, 5, 6, 7), (1, 8, 10)])
def test_ignored_targets_add_nothing_but_count_as_positions(ignored):
    hidden, weight, targets = inputs(11, ignored=ignored)
    ours = gradients(linear_cross_entropy, hidden, weight, targets)
    assert_same(ours, gradients(definition, hidden, weight, targets), 1e-12)
    assert not ours[1][list(ignored)].any()


def test_only_ignored_targets_cost_nothing():
    value, d_hidden, d_weight = gradients(linear_cross_entropy, *inputs(9, ignored=range(9)))
    assert value == 0 and not d_hidden.any() and not d_weight.any()


def test_micro_batches_of_one_shape_sum_to_the_whole_whatever_is_ignored():
    hidden, weight, targets = inputs(4, 6, ignored=(0, 1, 2, 3, 4, 5, 13))
    whole = gradients(linear_cross_entropy, hidden, weight, targets)
    parts = [gradients(linear_cross_entropy, hidden[i : i + 1], weight, targets[i : i + 1], 1 / 4) for i in range(4)]
    assert_same(
        [sum(p[0] for p in parts) / 4, torch.cat([p[1] for p in parts]), sum(p[2] for p in parts)], whole, 1e-12
    )


def test_padding_rows_are_outside_the_softmax():
    hidden, weight, targets = inputs(9)
    expected = gradients(linear_cross_entropy, hidden, weight, targets)
    assert not expected[2][VOCABULARY:].any()
    weight[VOCABULARY:] = 1e3
    ours = gradients(linear_cross_entropy, hidden, weight, targets)
    for a, b in zip(ours, expected):
        assert torch.equal(a, b)


def test_a_tied_weight_gets_both_gradients():
    ids = torch.arange(10).view(2, 5) * 3

    def tied(function):
        def value(hidden, weight, targets, vocab_size):
            return function(hidden + torch.tanh(weight[ids]), weight, targets, vocab_size)

        return gradients(value, *inputs(2, 5))

    assert_same(tied(linear_cross_entropy), tied(definition), 1e-12)


def test_fp32_follows_the_definition_to_its_rounding():
    hidden, weight, targets = inputs(30, dtype=torch.float32)
    ours = gradients(linear_cross_entropy, hidden, weight, targets)
    assert {t.dtype for t in ours} == {torch.float32}
    # A logit of at most 20 carries WIDTH roundings of 2^-24 of it: 7e-6 absolute.
    expected = gradients(definition, hidden.double(), weight.double(), targets)
    assert_same([t.double() for t in ours], expected, 1e-5)


def test_huge_logits_stay_finite():
    hidden, weight, targets = inputs(9)
    case = hidden * 1e4, weight, targets
    assert_same(gradients(linear_cross_entropy, *case), gradients(definition, *case), 1e-12)


def bf16_error_bounds(hidden, weight, targets):
    """For fp64 inputs that are bf16 numbers: how far rounded products can move the loss and both gradients.

    A logit is rounded once, by e at most: a log-probability moves by 2e, a probability by a factor exp(2e). Then the
    probabilities, the scaled hidden states and the product are rounded, and a bf16 gradient once more.
    """
    logits = hidden @ weight[:VOCABULARY].T
    e = BF16_ROUNDOFF * float(logits.abs().max())
    factor = float(torch.exp(torch.tensor(2 * e))) * (1 + BF16_ROUNDOFF) ** 4 - 1
    mass = torch.softmax(logits, -1) + torch.nn.functional.one_hot(targets, VOCABULARY)
    d_weight = torch.zeros_like(weight)
    d_weight[:VOCABULARY] = mass.T @ hidden.abs()
    n = len(targets)
    return 2 * e, factor * (mass @ weight[:VOCABULARY].abs()) / n, factor * d_weight / n


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_products_stay_within_their_rounding(hidden_dtype, weight_dtype):
    hidden, weight, targets = inputs(30, dtype=torch.bfloat16)
    hidden = hidden / 4
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=torch.float32 in (hidden_dtype, weight_dtype)):
        ours = gradients(linear_cross_entropy, hidden.to(hidden_dtype), weight.to(weight_dtype), targets)
    assert [t.dtype for t in ours] == [torch.float32, hidden_dtype, weight_dtype]
    expected = gradients(definition, hidden.double(), weight.double(), targets)
    for a, b, bound in zip(ours, expected, bf16_error_bounds(hidden.double(), weight.double(), targets)):
        assert ((a.double() - b).abs() <= bound).all()
    in_fp32 = linear_cross_entropy(hidden.float(), weight.float(), targets, VOCABULARY)
    assert ours[0] != in_fp32, "the products were not taken in bf16"


def test_autocast_leaves_fp64_alone():
    case = inputs(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = gradients(linear_cross_entropy, *case)
    assert_same(ours, gradients(definition, *case), 1e-12)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.layer = torch.nn.Embedding(PADDED, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, targets):
        return linear_cross_entropy(self.layer(self.tokens(ids)), self.tokens.weight, targets, VOCABULARY)


def test_compiled_it_is_one_graph_with_the_same_result():
    torch.manual_seed(0)
    model, (_, _, targets) = Tied(), inputs(2, 9)
    results = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        value = run(targets, targets.roll(-1, 1))
        (value * 3).backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    assert_same(*results, 1e-6)


@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, False)])
def test_the_operator_keeps_to_its_declaration(wants):
    arguments = *inputs(9, dtype=torch.float32), VOCABULARY, torch.bfloat16, *wants
    torch.library.opcheck(module._walk, arguments, test_utils=("test_faketensor", "test_schema"))


def largest_allocation(function) -> int:
    """The most bytes that one operation inside ``function``, at any depth, took and kept for its result."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_tensor_of_tokens_by_vocabulary_is_allocated():
    tokens, padded = 64, 4096
    hidden = torch.randn(tokens, WIDTH, requires_grad=True)
    weight = torch.randn(padded, WIDTH, requires_grad=True)
    targets = torch.randint(padded, (tokens,))
    all_logits, one_block = 4 * tokens * padded, 4 * padded * max(4, WIDTH)
    whole = largest_allocation(
        lambda: torch.nn.functional.cross_entropy(full_logits(hidden, weight, padded), targets).backward()
    )
    assert whole >= all_logits, "the measurement does not see a tensor of logits"
    assert largest_allocation(lambda: linear_cross_entropy(hidden, weight, targets, padded).backward()) <= one_block


def test_without_a_use_for_it_no_gradient_of_the_weight_is_made():
    hidden, weight = torch.randn(3, 256, requires_grad=True), torch.randn(2048, 256, requires_grad=True)
    targets = torch.randint(2048, (3,))

    def training():
        linear_cross_entropy(hidden, weight, targets, 2048).backward()

    def frozen():
        linear_cross_entropy(hidden, weight.detach(), targets, 2048).backward()

    @torch.no_grad()
    def evaluation():
        return linear_cross_entropy(hidden, weight, targets, 2048)

    size = 4 * weight.numel()
    assert largest_allocation(training) >= size
    assert largest_allocation(frozen) < size and largest_allocation(evaluation) < size
    torch.testing.assert_close(
        evaluation().double(), definition(hidden.double(), weight.double(), targets, 2048), rtol=1e-5, atol=0
    )


def test_backward_reads_neither_weight_nor_hidden():
    case = inputs(9)
    hidden, weight = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    value = linear_cross_entropy(hidden, weight, case[2], VOCABULARY)
    hidden.data.fill_(torch.nan)
    weight.data.fill_(torch.nan)
    value.backward()
    assert_same([hidden.grad, weight.grad], gradients(definition, *case)[1:], 1e-12)


def test_a_second_backward_is_right_and_a_second_derivative_is_refused():
    hidden, weight, targets = inputs(9)
    hidden.requires_grad_()
    value = linear_cross_entropy(hidden, weight, targets, VOCABULARY)
    first, second = (torch.autograd.grad(value, hidden, torch.tensor(s), retain_graph=True)[0] for s in (2.0, 4.0))
    torch.testing.assert_close(second, 2 * first, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, hidden, create_graph=True)


def test_a_target_among_the_padding_is_not_hidden():
    hidden, weight, targets = inputs(9)
    targets[3] = VOCABULARY
    assert linear_cross_entropy(hidden, weight, targets, VOCABULARY) == torch.inf


def test_what_does_not_fit_is_refused():
    hidden, weight, targets = inputs(9)
    for bad in ((hidden[1:], weight, targets), (hidden[:, 1:], weight, targets)):
        with pytest.raises(ValueError, match="do not fit"):
            linear_cross_entropy(*bad, VOCABULARY)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden, weight, targets, PADDED + 1)
    with pytest.raises(TypeError, match="must be equal"):
        linear_cross_entropy(hidden.float(), weight, targets, VOCABULARY)
    with pytest.raises(TypeError, match="float16"):
        linear_cross_entropy(hidden.half(), weight.half(), targets, VOCABULARY)


def test_full_logits_leave_the_padding_out():
    hidden, weight, _ = inputs(2, 5)
    expected = torch.einsum("btc,vc->btv", hidden, weight)[..., :VOCABULARY]
    torch.testing.assert_close(full_logits(hidden, weight, VOCABULARY), expected, rtol=1e-12, atol=1e-12)
