"""The validation loss is the mean over fixed windows, however they are cut into micro-batches and ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.tokenizer import RANKS_SHA256, gpt2_encoding
from megaresid.data.manifest import Tokenizer
from megaresid.errors import UserError
from megaresid.evaluation.hook import Hook
from megaresid.evaluation.validation import Validation, bytes_of_ids
from megaresid.model.gpt import build
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

SHAPE = ModelShape(layers=1, heads=2, width=16, context=8, vocab_size=60)

GPT2 = Tokenizer(name="gpt2", sha256=RANKS_SHA256, vocab_size=50257, end_of_text=50256)


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


@pytest.mark.parametrize("ranks", [1, 2])
def test_bits_per_byte_are_all_nats_over_the_bytes_of_the_targets(stream, monkeypatch, ranks):
    """By a loop over the targets of 12 windows, with 0 bytes for the last id and 1 to 5 for the others."""
    lengths = [1 + (7 * id) % 5 for id in range(59)] + [0]
    engine, group = PlainEngine(micro_batch=5), Ranks(monkeypatch, ranks)  # the last micro-batch is padded
    for group.rank in range(ranks):
        validation(stream, bytes_of_ids=torch.tensor(lengths))(engine)
    nats, text_bytes = sum(group.sums).tolist()
    targets = [int(stream.tokens[window * 8 + 1 + column]) for window in range(12) for column in range(8)]
    assert 59 in targets and text_bytes == sum(lengths[target] for target in targets)
    assert nats == pytest.approx(definition(engine, stream, 12) * 96, rel=1e-6)
    if ranks == 1:
        found = validation(stream, bytes_of_ids=torch.tensor(lengths))(engine)
        assert found["val_bits_per_byte"] == pytest.approx(found["val_loss"] * 96 / math.log(2) / text_bytes, rel=1e-12)


def test_the_bytes_of_gpt2s_ids(tmp_path, monkeypatch):
    encoding = gpt2_encoding()
    lengths = bytes_of_ids(GPT2)
    assert lengths.shape == (50257,) and lengths[50256] == 0
    text = "Bytes, not characters: naïve 漢字 🙂\n\n" + "".join(map(chr, range(32, 2000)))
    assert lengths[encoding.encode_ordinary(text)].sum() == len(text.encode())
    assert bytes_of_ids(GPT2.model_copy(update={"sha256": "0" * 64})) is None
    monkeypatch.setenv("MEGARESID_GPT2_VOCAB", str(tmp_path / "missing"))
    assert bytes_of_ids(GPT2) is None


class Damaged(Stream):
    """An id outside the vocabulary in window 7 of 12."""

    def __init__(self, tokens):
        super().__init__(tokens.copy())
        self.tokens[7 * 8 + 3] = 60

    def place(self, window, column, context):
        return Path("val_000000.bin"), window * context + column


def test_a_bad_id_on_one_rank_is_raised_when_no_rank_waits_for_it(stream, monkeypatch):
    engine, group, forwards = PlainEngine(2), Ranks(monkeypatch, 2), []
    for group.rank in range(2):
        engine.forwards, failed = 0, False
        try:
            validation(Damaged(stream.tokens))(engine)
        except UserError as error:
            assert "val_000000.bin: token 59 is id 60" in str(error)
            failed = True
        forwards.append((engine.forwards, failed, len(group.sums)))
    assert forwards == [(3, False, 1), (3, True, 2)]


def test_a_split_without_one_window_is_refused():
    with pytest.raises(UserError, match="validation needs one window of 9 tokens: the split has 8 tokens"):
        validation(Stream(np.zeros(8, dtype=np.uint16)))


def test_a_hook_is_due_at_its_interval_and_at_both_ends():
    hook = Hook("x", 50, lambda engine: {})
    assert [step for step in range(121) if hook.due(step, last=120)] == [0, 50, 100, 120]
    assert [step for step in range(121) if Hook("x", None, lambda engine: {}).due(step, last=120)] == [120]
