"""Scores of requests against the definition: one request at a time, all logits in fp64, in plain loops."""

import io
import random
import re
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.file_proxy import FileProxy
from small_models import SHAPE, model_of

from megaresid.evaluation import progress, scoring
from megaresid.evaluation.loaded import LoadedModel
from megaresid.evaluation.scoring import Request, Score, score

CONTEXT, VOCABULARY = SHAPE.context, SHAPE.vocab_size
MODEL = model_of("vanilla").eval()


class Watched(LoadedModel):
    """Keeps the shape of each forward, and says whether more targets were asked of one position."""

    def __init__(self, positions_per_forward: int, model=MODEL):
        super().__init__(model, torch.device("cpu"), None, positions_per_forward)
        self.shapes, self.several, self.wanted = [], False, 0

    def score(self, idx, targets):
        self.shapes.append(tuple(idx.shape))
        self.several |= targets.ndim > 2
        self.wanted += int((targets >= 0).sum())
        return super().score(idx, targets)


def definition(request: Request, model=MODEL) -> Score:
    """As lm-evaluation-harness has it: the last context + 1 tokens, all but the last one as input."""
    tokens = [int(token) for token in [*request.context, *request.continuation]][-(CONTEXT + 1) :]
    predicted = min(len(request.continuation), CONTEXT)
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([tokens[:-1]]))[0][0].double(), -1)
    total, greedy = 0.0, True
    for place in range(len(tokens) - predicted, len(tokens)):
        total += log_p[place - 1][tokens[place]].item()
        greedy &= int(log_p[place - 1].argmax()) == tokens[place]
    return Score(total, greedy)


def assert_scores(found: list[Score], requests: list[Request], tolerance: float = 1e-10) -> None:
    assert len(found) == len(requests)
    for given_score, request in zip(found, requests, strict=True):
        expected = definition(request)
        assert given_score.log_probability == pytest.approx(expected.log_probability, abs=tolerance, rel=tolerance)
        assert given_score.greedy is expected.greedy


def likeliest_after(context: list[int], tokens: int) -> list[int]:
    ids = list(context)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(MODEL(torch.tensor([ids[-CONTEXT:]]))[0][0, -1].argmax()))
    return ids[len(context) :]


# Few ids, so that requests are equal, share their beginnings, and ask different things of one position.
FEW = st.lists(st.integers(0, 2), min_size=1, max_size=CONTEXT + 4)
REQUESTS = st.lists(st.builds(Request, FEW, FEW), max_size=12)


@settings(max_examples=120, deadline=None)
@given(requests=REQUESTS, positions=st.sampled_from([1, CONTEXT, 3 * CONTEXT, 1000]))
def test_scores_are_the_definition_whatever_the_batch_size(requests, positions):
    engine = Watched(positions)
    assert_scores(score(engine, requests), requests)
    assert all(rows == 1 or rows * length <= positions for rows, length in engine.shapes)
    lengths = [length for _, length in engine.shapes]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("context", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT])
@pytest.mark.parametrize("continuation", [1, 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, CONTEXT + 2])
def test_what_does_not_fit_is_cut_on_the_left(context, continuation):
    drawn = random.Random(context * 100 + continuation)
    request = Request(*([drawn.randrange(VOCABULARY) for _ in range(size)] for size in (context, continuation)))
    assert_scores(score(Watched(CONTEXT), [request]), [request])


def test_greedy_is_every_token_of_the_continuation():
    requests = []
    for start in range(6):
        right = likeliest_after([start], 4)
        wrong = [(token + 1) % VOCABULARY for token in right]
        requests += [Request([start], right), Request([start], wrong), Request([start], [*right[:3], wrong[3]])]
        requests += [Request([start, *right[:2]], right[2:]), Request([start], [wrong[0], *right[1:]])]
    found = score(Watched(3 * CONTEXT), requests)
    assert_scores(found, requests)
    assert [s.greedy for s in found[0::5]] == [True] * 6 and not any(s.greedy for s in found[1::5] + found[2::5])


def test_ids_may_be_arrays_tuples_and_lists_of_any_integer_type():
    tokens = np.array([3, 1, 4, 1, 5, 9, 2, 6], dtype=np.uint16)
    requests = [Request(tokens[:3], tokens[3:]), Request(tuple(tokens[:3].tolist()), [1, 5, 9])]
    requests += [Request([3], tokens[1:]), Request(torch.arange(3).numpy(), np.array([30], dtype=np.uint8))]
    assert_scores(score(Watched(CONTEXT), requests), requests)


def test_equal_requests_and_choices_of_one_question_share_a_run():
    question = [7, 8, 9]
    choices = [[1], [2], [3], [1], [1, 2], [1, 2, 3], [2, 2]]
    requests = [Request(question, choice) for choice in choices]
    engine = Watched(1000)
    assert_scores(score(engine, requests), requests)
    # 7 8 9 1 2 answers all but the last, which needs 7 8 9 2; and [1] is asked once.
    assert engine.shapes == [(2, 5)] and engine.several and engine.wanted == 3 + 2 + 3 + 2


def test_no_row_is_asked_too_much(monkeypatch):
    """A batch would have places for all of it at every position."""
    monkeypatch.setattr(scoring, "MOST_ASKED", 5)
    requests = [Request([7, 8], [token]) for token in range(13)] + [Request([7], [8, token]) for token in range(3)]
    engine = Watched(1000)
    assert_scores(score(engine, requests), requests)
    assert engine.shapes == [(4, 2)]


def test_windows_of_one_text_share_its_run():
    """As the last words of passages that stand one behind another do."""
    text = list(range(CONTEXT + 1))
    requests = [Request(text[:end], text[end : end + 2]) for end in (1, 3, 5, CONTEXT - 1)]
    engine = Watched(1000)
    assert_scores(score(engine, requests), requests)
    assert engine.shapes == [(1, CONTEXT)] and not engine.several


@pytest.mark.parametrize("positions", [4 * CONTEXT, 100 * CONTEXT])
def test_little_is_padding(positions, monkeypatch):
    monkeypatch.setattr(scoring, "ENOUGH_POSITIONS", 2 * CONTEXT)
    drawn = random.Random(0)
    requests = [Request([drawn.randrange(VOCABULARY) for _ in range(1 + n % 7)], [n % 5]) for n in range(300)]
    engine = Watched(positions)
    score(engine, requests)
    run = sum(rows * length for rows, length in engine.shapes)
    assert run < 1.1 * sum(len(context) for context in {tuple(r.context) for r in requests})


def test_a_forward_on_a_cpu_keeps_to_what_is_fast_there(monkeypatch):
    monkeypatch.setattr(scoring, "CPU_POSITIONS", 3 * CONTEXT)
    engine = Watched(1000)
    score(engine, [Request([n] * CONTEXT, [1]) for n in range(7)])
    assert engine.shapes == [(3, CONTEXT), (3, CONTEXT), (1, CONTEXT)]


def test_a_batch_is_large_though_that_takes_padding():
    engine = Watched(1000)
    score(engine, [Request([n] * (1 + n % 7), [1]) for n in range(30)])
    assert engine.shapes == [(30, 7)]


def test_no_requests_are_no_forward():
    engine = Watched(8)
    assert score(engine, []) == [] and engine.shapes == []


@pytest.mark.parametrize(
    "request_, told",
    [
        (Request([], [1]), "request 1: its context is empty"),
        (Request([1], []), "request 1: its continuation is empty"),
        (Request(np.array([], dtype=np.int64), [1]), "request 1: its context is empty"),
        (Request([1], [2, VOCABULARY]), f"request 1: {VOCABULARY} is no id of a vocabulary of {VOCABULARY}"),
        (Request([-1], [2]), f"request 1: -1 is no id of a vocabulary of {VOCABULARY}"),
        (Request([False], [True]), f"request 1: False is no id of a vocabulary of {VOCABULARY}"),
        (Request([1.5], [2]), f"request 1: 1.5 is no id of a vocabulary of {VOCABULARY}"),
    ],
)
def test_a_request_that_cannot_be_scored_is_named(request_, told):
    engine = Watched(8)
    with pytest.raises(ValueError, match=re.escape(told)):
        score(engine, [Request([1], [2]), request_])
    assert engine.shapes == []


def of_ranks(requests: list[Request], positions: int):
    """Runs on every rank: the scores, and this rank's forwards."""
    engine = Watched(positions)
    return score(engine, requests), engine.shapes


def some_requests(count: int) -> list[Request]:
    drawn = random.Random(count)
    sizes = [(drawn.randint(1, CONTEXT + 2), drawn.randint(1, 4)) for _ in range(count)]
    return [Request(*([drawn.randrange(3) for _ in range(size)] for size in pair)) for pair in sizes]


@pytest.mark.parametrize("count", [1, 2, 3, 40])
@pytest.mark.parametrize("positions", [CONTEXT, 1000])
def test_two_ranks_share_the_work_and_know_all_scores(count, positions, ranks2):
    requests = some_requests(count)
    (found, shapes), (other, other_shapes) = ranks2.run(of_ranks, requests, positions)
    assert found == other
    assert_scores(found, requests)
    assert len(shapes) == len(other_shapes), "ranks differ in how often they run the model: ZeRO-3 would hang"
    alone = Watched(positions)
    score(alone, requests)
    work, shared = (sum(rows * length for rows, length in some) for some in (alone.shapes, shapes))
    if count == 40:
        assert shared < 0.65 * work


@pytest.mark.parametrize("ranks", [3, 5])
@settings(max_examples=20, deadline=None)
@given(requests=REQUESTS.filter(len), positions=st.sampled_from([CONTEXT, 1000]))
def test_any_number_of_ranks(ranks, requests, positions):
    """Played one after another: their sums are added here."""
    sums, forwards = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: True)
        patch.setattr(dist, "get_world_size", lambda: ranks)
        patch.setattr(dist, "all_reduce", lambda totals: sums.append(totals.clone()))
        for rank in range(ranks):
            engine = Watched(positions)
            patch.setattr(dist, "get_rank", lambda rank=rank: rank)
            score(engine, requests)
            forwards.append(len(engine.shapes))
        assert len(set(forwards)) == 1
        patch.setattr(dist, "all_reduce", lambda totals: totals.copy_(sum(sums)))
        patch.setattr(dist, "get_rank", lambda: 0)
        assert_scores(score(Watched(positions), requests), requests)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_loaded_model_keeps_its_precision(dtype):
    """In bf16 within what rounding makes of a few layers; and not by chance the same."""
    model = model_of("vanilla", away=0.1, dtype=torch.float32)
    engine = LoadedModel(model.train(), torch.device("cpu"), dtype, 100)
    assert not model.training
    requests = some_requests(30)
    pairs = zip(score(engine, requests), requests, strict=True)
    errors = [abs(found.log_probability - definition(request, model).log_probability) for found, request in pairs]
    assert max(errors) < 1e-5 if dtype is None else 1e-3 < max(errors) < 0.3
    idx = torch.arange(CONTEXT)[None]
    loss = -sum(s.log_probability for s in score(engine, [Request([0], list(range(1, CONTEXT + 1)))])) / CONTEXT
    assert engine.loss(idx, idx + 1).item() == pytest.approx(loss, rel=1e-6)


def test_a_loaded_model_takes_no_more_than_its_context():
    with pytest.raises(ValueError, match="longer than the model's context of 8"):
        Watched(100).score(*(torch.zeros(1, CONTEXT + 1, dtype=torch.int64),) * 2)


def test_lines_tell_how_far_it_is_where_there_is_no_terminal(monkeypatch, capsys):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(progress.followed("abcdef", 6, "scoring")) == list("abcdef")
    told = capsys.readouterr()
    assert told.out == "" and re.fullmatch(r"(scoring: \d of 6\n){2,3}", told.err)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_drawn_on_a_terminal_unless_another_is(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress.followed(range(3), 3, "scoring")) == [0, 1, 2]
    assert "scoring" in terminal.getvalue()
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", FileProxy(progress.Console(file=terminal), terminal))
    assert list(progress.followed(range(3), 3, "scoring")) == [0, 1, 2]
    assert terminal.getvalue() == ""
