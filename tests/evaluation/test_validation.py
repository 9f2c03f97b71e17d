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

    def __init__(self, micro_batch=3):
        self.positions_per_forward = micro_batch * 8
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


def validation(stream, tokens=10_000, **options):
    return Validation(stream, context=8, tokens=tokens, vocab_size=60, **options)


class Ranks:
    """Ranks that are played one after another. ``sums`` are what they hand to the all-reduce."""

    def __init__(self, monkeypatch, ranks):
        self.rank, self.sums = 0, []
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: self.rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: ranks)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: self.sums.append(total.clone()))


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
    engine, group, forwards = PlainEngine(micro_batch), Ranks(monkeypatch, ranks), []
    for group.rank in range(ranks):
        engine.forwards = 0
        validation(stream)(engine)
        forwards.append(engine.forwards)
    nats, no_bytes = sum(group.sums).tolist()
    assert no_bytes == 0
    assert nats / (12 * 8) == pytest.approx(definition(engine, stream, 12), rel=1e-6)
    assert len(set(forwards)) == 1, "ranks differ in how often they call the model: ZeRO-3 would hang"


def test_the_token_limit_cuts_to_whole_windows_and_a_process_without_ranks_will_do(stream):
    engine = PlainEngine()
    found = validation(stream, tokens=5 * 8 + 7)(engine)["val_loss"]
    assert found == pytest.approx(definition(engine, stream, 5), rel=1e-6)


def test_a_split_without_one_window_is_refused():
    with pytest.raises(UserError, match="validation needs one window of 9 tokens: the split has 8 tokens"):
        validation(Stream(np.zeros(8, dtype=np.uint16)))


def test_a_hook_is_due_at_its_interval_and_at_both_ends():
    hook = Hook("x", 50, lambda engine: {})
    assert [step for step in range(121) if hook.due(step, last=120)] == [0, 50, 100, 120]
    assert [step for step in range(121) if Hook("x", None, lambda engine: {}).due(step, last=120)] == [120]
