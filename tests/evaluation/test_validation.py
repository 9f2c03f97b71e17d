"""The validation loss is the mean over fixed windows, however they are cut into micro-batches and ranks."""

import numpy as np
import pytest
import torch

from megaresid.errors import UserError
from megaresid.evaluation.hook import Hook
from megaresid.evaluation.validation import Validation
from megaresid.model.gpt import build
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

SHAPE = ModelShape(layers=1, heads=2, width=16, context=8, vocab_size=60)


class Stream:
    """As much of a TokenStream as validation reads, from an array."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read_windows(self, windows: np.ndarray, context: int) -> np.ndarray:
        return np.array([self.tokens[w * context : (w + 1) * context + 1] for w in windows]).reshape(-1, context + 1)


class PlainEngine:
    """As much of an Engine as validation calls."""

    device = torch.device("cpu")

    def __init__(self):
        self.model = build(ModelPlan(SHAPE), seed=0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(5)
        self.forwards = 0

    @torch.no_grad()
    def loss(self, idx, targets):
        self.forwards += 1
        return self.model(idx, targets)[1]


@pytest.fixture
def stream():
    return Stream(np.random.default_rng(0).integers(0, 60, size=100).astype(np.uint16))


def validation(stream, rank=0, ranks=1, micro_batch=3, tokens=10_000):
    options = {"context": 8, "tokens": tokens, "micro_batch": micro_batch, "vocab_size": 60}
    return Validation(stream, rank=rank, ranks=ranks, **options)


def definition(engine, stream, count):
    """Mean of -log p(next token) over the first ``count`` windows."""
    losses = []
    for window in range(count):
        tokens = torch.from_numpy(stream.tokens[window * 8 : window * 8 + 9].astype(np.int64))
        with torch.no_grad():
            log_p = torch.log_softmax(engine.model(tokens[None, :8])[0][0].double(), -1)
        losses += [-log_p[t, tokens[t + 1]].item() for t in range(8)]
    return np.mean(losses)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [1, 3, 16])
def test_every_cut_gives_the_mean_over_all_windows(stream, monkeypatch, ranks, micro_batch):
    """99 predicted tokens hold 12 windows of 8. Ranks are played one after another; their sums are added here."""
    engine, sums, forwards = PlainEngine(), [], []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: sums.append(total.item()))
    for rank in range(ranks):
        engine.forwards = 0
        validation(stream, rank, ranks, micro_batch)(engine)
        forwards.append(engine.forwards)
    assert sum(sums) / (12 * 8) == pytest.approx(definition(engine, stream, 12), rel=1e-6)
    assert len(set(forwards)) == 1, "ranks differ in how often they call the model: ZeRO-3 would hang"


def test_the_token_limit_cuts_to_whole_windows(stream, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: None)
    engine = PlainEngine()
    found = validation(stream, tokens=5 * 8 + 7)(engine)["val_loss"]
    assert found == pytest.approx(definition(engine, stream, 5), rel=1e-6)


def test_a_split_without_one_window_is_refused():
    with pytest.raises(UserError, match="validation needs one window of 9 tokens: the split has 8 tokens"):
        validation(Stream(np.zeros(8, dtype=np.uint16)))


def test_a_hook_is_due_at_its_interval_and_at_both_ends():
    hook = Hook("x", 50, lambda engine: {})
    assert [step for step in range(121) if hook.due(step, last=120)] == [0, 50, 100, 120]
    assert not any(Hook("x", 0, lambda engine: {}).due(step, 120) for step in range(121))
