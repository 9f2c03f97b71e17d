"""Which tokens may be drawn, how often they are, and a text that is made of them one after another."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare
from small_models import SHAPE, move_away

from megaresid.attention.softmax import Softmax
from megaresid.errors import UserError
from megaresid.model.gpt import GPT, TokenEmbedding, build, canonical_parameters
from megaresid.model.plan import ModelPlan
from megaresid.sampling import Sampling, continuation, tokens_seen

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.1, -0.2, 1.9])
DRAWS = 4000


def define(logits: list[float], sampling: Sampling) -> tuple[dict[int, float], float]:
    """Probability by id, written out; and how near a sum of probabilities comes to top_p."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: sampling.top_k or None]
    weights = [math.exp((logits[token] - logits[order[0]]) / sampling.temperature) for token in order]
    kept, sums = {}, []
    for token, weight in zip(order, weights):
        kept[token] = weight
        sums.append(math.fsum(kept.values()) / math.fsum(weights))
        if sums[-1] >= sampling.top_p < 1:
            break
    total = math.fsum(kept.values())
    return {token: weight / total for token, weight in kept.items()}, min(abs(s - sampling.top_p) for s in sums)


VALUES = st.integers(-12, 12).map(lambda value: value / 4)  # few, so that many are equal
SAMPLINGS = st.builds(Sampling, st.floats(0.05, 20), st.integers(0, 12), st.one_of(st.just(1.0), st.floats(0.01, 1)))


@given(st.lists(VALUES, min_size=1, max_size=10), SAMPLINGS)
def test_the_distribution_is_the_definition(logits, sampling):
    expected, margin = define(logits, sampling)
    assume(sampling.top_p == 1 or margin > 1e-9)  # equality is tested below, where the sums are exact
    ids, probabilities = sampling.distribution(torch.tensor(logits))
    found = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    assert found.keys() == expected.keys()
    assert all(abs(found[token] - expected[token]) < 1e-12 for token in found)


REACHED = [(1e-9, 1), (0.25, 1), (0.2500001, 2), (0.5, 2), (0.75, 3), (0.9, 4), (1.0, 4)]


@pytest.mark.parametrize(("top_p", "kept"), REACHED)
def test_the_set_is_the_smallest_that_reaches_top_p_and_equal_tokens_go_by_id(top_p, kept):
    ids, probabilities = Sampling(1.0, 0, top_p).distribution(torch.tensor([-100.0, 3.0, 3.0, 3.0, 3.0]))
    tail = [0] if top_p == 1 else []
    assert sorted(ids.tolist()) == tail + list(range(1, 1 + kept))
    assert abs(float(probabilities.sum()) - 1) < 1e-12


def test_top_k_keeps_k_of_equal_tokens():
    for k in (1, 2, 3):
        assert Sampling(1.0, k).distribution(torch.tensor([0.0, 5.0, 5.0, 5.0]))[0].tolist() == [1, 2, 3][:k]


def test_equal_tokens_go_by_id_in_a_large_vocabulary_too():
    logits = torch.tensor([0.0, 9.0]).repeat(5000)
    for sampling in (Sampling(1.0, 40), Sampling(1.0, 0, 39.5 / 5000)):
        assert sampling.distribution(logits)[0].tolist() == list(range(1, 80, 2))


def test_top_p_acts_on_what_top_k_left_at_the_temperature():
    """Of two tokens at 2/3 and 1/3, where a third would have made it less than half."""
    logits = torch.tensor([2.0, 1.0, 1.0]) * math.log(2)
    assert Sampling(1.0, 2, 0.6).distribution(logits)[0].tolist() == [0]
    assert Sampling(1.0, 0, 0.6).distribution(logits)[0].tolist() == [0, 1]
    assert Sampling(9.0, 2, 0.6).distribution(logits)[0].tolist() == [0, 1]


def draw(sampling: Sampling, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """How often each id was chosen in DRAWS draws."""
    generator = torch.Generator().manual_seed(1)
    chosen = [sampling.choose(logits, generator) for _ in range(DRAWS)]
    return torch.bincount(torch.tensor(chosen), minlength=len(logits))


def follows(counts: torch.Tensor, probabilities: dict[int, float]) -> bool:
    """Whether only these ids were drawn, and a chi-squared test lets the counts pass at 1 in 1,000. The seed is fixed,
    so the answer is too."""
    ids = list(probabilities)
    expected = [probabilities[token] * DRAWS for token in ids]
    return int(counts[ids].sum()) == DRAWS and chisquare(counts[ids].numpy(), expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(2.0), Sampling(1.0, 100), Sampling(3.0, 3), Sampling(1.5, 0, 0.8), Sampling(2.0, 4, 0.7)],
    ids=str,
)
def test_draws_follow_the_definition(sampling):
    counts = draw(sampling)
    assert follows(counts, define(LOGITS.tolist(), sampling)[0])
    assert not follows(counts, define(LOGITS.tolist(), Sampling(0.7, 5))[0]), "the test can tell one from another"


def test_temperature_0_and_top_1_take_the_largest_and_of_equal_ones_the_first():
    for sampling in (Sampling(0), Sampling(0, 3, 0.5), Sampling(1.0, 1), Sampling(5.0, 1), Sampling(9.0, 0, 1e-9)):
        assert draw(sampling)[2] == DRAWS
        assert sampling.choose(torch.tensor([1.0, 4.0, 4.0]), torch.Generator()) == 1


def test_a_small_temperature_and_large_logits_do_not_overflow():
    for temperature in (1e-300, 5e-324):
        assert Sampling(temperature).choose(torch.tensor([1e38, 3e38, -3e38]), torch.Generator()) == 1
    assert Sampling(1.0).distribution(torch.tensor([3e38, 3e38]))[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_of_a_diverged_model_are_told_of(value):
    for sampling in (Sampling(0), Sampling(1.0, 3, 0.9)):
        with pytest.raises(UserError, match="its training has diverged"):
            sampling.choose(torch.tensor([0.0, value, 1.0]), torch.Generator())


class Forgetful(Softmax):
    decodes = False


END = 39
END_SHAPE = SHAPE.model_copy(update={"end_of_text": END})


def model_of(
    residual: str = "vanilla",
    attention: str = "softmax",
    documents: bool = False,
    dtype: torch.dtype = torch.float64,
) -> GPT:
    """A small model away from initialisation, whose id 39 is <|endoftext|>."""
    model = build(ModelPlan(END_SHAPE, attention, residual, documents=documents), seed=0).to(dtype).eval()
    move_away(canonical_parameters(model, model.prefixes), 0.2, END_SHAPE.vocab_size)
    return model


MIXERS = {
    "softmax": (8, True),
    "softmax(positions=rope, kv_heads=1)": (None, True),
    "softmax(positions=none, window=3)": (None, True),
    "gated_delta_net": (None, True),
    "gla + softmax": (8, True),
    "test_sampling:Forgetful": (8, False),
    "test_sampling:Forgetful(positions=rope)": (8, False),
}
"""How many tokens of a text the model sees (None: all), and whether it goes on from what it kept."""


class Script:
    """Stands for a Sampling: takes given tokens, and keeps the logits that it could have drawn from."""

    def __init__(self, tokens: list[int]):
        self.tokens, self.logits = tokens, []

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        self.logits.append(logits)
        return self.tokens[len(self.logits) - 1]


SCRIPT = [(11 * n * n + 5 * n) % 40 for n in range(16)]


@torch.no_grad()
def logits_after(model, ids: list[int], seen: int | None) -> torch.Tensor:
    """Of the token after ``ids``, by a forward over all that is seen."""
    return model(torch.tensor([ids[-(seen or 999) :]]))[0][0, -1]


@pytest.mark.parametrize("documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("residual", ["vanilla", "hyper_connections"])
@pytest.mark.parametrize("attention", MIXERS)
def test_every_token_is_run_once_and_the_logits_are_those_of_running_all_again(
    attention, residual, documents, monkeypatch
):
    """Within the context of eight and beyond it; with documents one begins inside of the prompt."""
    seen, decodes = MIXERS[attention]
    model, script = model_of(residual, attention=attention, documents=documents), Script(SCRIPT)
    assert tokens_seen(model) == seen
    prompt = [3, END, 4]
    expected = [logits_after(model, prompt + SCRIPT[:n], seen) for n in range(16)]
    monkeypatch.setattr(TokenEmbedding, "forward", counting(TokenEmbedding.forward, lengths := []))
    assert list(continuation(model, prompt, 16, script, 0)) == SCRIPT
    torch.testing.assert_close(torch.stack(script.logits), torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert not any(logits.requires_grad for logits in script.logits)
    once = [3, *[1] * (5 if seen else 15)]
    assert lengths == (once + [8] * (16 - len(once)) if decodes else [3, 4, 5, 6, 7, *[8] * 11])


@pytest.mark.parametrize("attention", MIXERS)
def test_a_prompt_longer_than_the_context(attention, monkeypatch):
    """All of it is seen, a context at a time, or the last context."""
    seen, _ = MIXERS[attention]
    model, script, prompt = model_of(attention=attention), Script(SCRIPT), [7 * n % 40 for n in range(21)]
    expected = [logits_after(model, prompt + SCRIPT[:n], seen) for n in range(5)]
    monkeypatch.setattr(TokenEmbedding, "forward", counting(TokenEmbedding.forward, lengths := []))
    assert list(continuation(model, prompt, 5, script, 0)) == SCRIPT[:5]
    torch.testing.assert_close(torch.stack(script.logits), torch.stack(expected), rtol=1e-9, atol=1e-9)
    assert lengths == ([8] * 5 if seen else [8, 8, 5, 1, 1, 1, 1])


@pytest.mark.parametrize("attention", MIXERS)
def test_at_temperature_0_each_token_is_the_likeliest(attention):
    model, ids = model_of(attention=attention), [3, 1, 4]
    for _ in range(12):
        ids.append(int(logits_after(model, ids, MIXERS[attention][0]).argmax()))
    assert list(continuation(model, ids[:3], 12, Sampling(0), 0)) == ids[3:]


def counting(forward, lengths: list[int]):
    """``forward`` that notes how many tokens each call gets."""

    def noting(self, idx, *arguments):
        lengths.append(idx.shape[1])
        return forward(self, idx, *arguments)

    return noting


def test_draws_are_from_the_logits_of_the_text_so_far():
    """With the same generator, at a temperature: a draw a token."""
    model, sampling = model_of(), Sampling(2.0, 20, 0.9)
    ids, generator = [5], torch.Generator().manual_seed(11)
    for _ in range(12):
        ids.append(sampling.choose(logits_after(model, ids, 8), generator))
    assert list(continuation(model, [5], 12, sampling, seed=11)) == ids[1:]
    assert list(continuation(model, [5], 12, sampling, seed=12)) != ids[1:]


def test_a_document_ends_at_end_of_text():
    model, script = model_of(), Script([5, 5, END, 7])
    assert list(continuation(model, [3, 1, 4], 4, script, 0)) == [5, 5]
    assert len(script.logits) == 3, "nothing is run after the end"
    assert list(continuation(model, [END], 2, Script([1, 2]), 0)) == [1, 2], "and begins with it"


def test_the_products_are_of_the_type_that_is_asked_for():
    model = model_of(dtype=torch.float32)
    exact, rounded = Script(SCRIPT), Script(SCRIPT)
    list(continuation(model, [3, 1, 4], 1, exact, 0))
    list(continuation(model, [3, 1, 4], 1, rounded, 0, torch.bfloat16))
    error = (exact.logits[0] - rounded.logits[0]).abs().max() / exact.logits[0].abs().max()
    assert 1e-4 < error < 0.1
    assert rounded.logits[0].dtype == torch.float32


def test_tokens_come_one_by_one_and_gradients_stay_as_they_are_between_them():
    tokens = continuation(model_of(), [3, 1, 4], 3, Sampling(0), 0, torch.bfloat16)
    for _ in range(2):
        next(tokens)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
