"""The side-by-side measurement: what the peer is given, what is counted, and what is said when a side fails."""

import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from megaresid.benchmark import nanogpt, training
from megaresid.benchmark.training import WARM_UP, Measurement, measure, read_rows, report
from megaresid.errors import UserError

PEER = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    made, batches = [], []

    def __init__(self, config):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))
        GPT.made.append(config)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def forward(self, x, y):
        GPT.batches.append((x, y))
        return None, self.weight**2
"""


@pytest.fixture
def peer(tmp_path):
    folder = tmp_path / "peer"
    folder.mkdir()
    (folder / "model.py").write_text(PEER)
    return folder


def test_the_peer_gets_our_shape_and_the_windows_of_our_data(peer, tmp_path, monkeypatch):
    import megaresid.data.manifest
    import megaresid.data.shards

    class Counting:
        """A stream whose token at position p is p."""

        def __len__(self):
            return 5000

        def read(self, start, length):
            return np.arange(5000, dtype=np.uint16)[start : start + length]

    monkeypatch.setattr(megaresid.data.manifest, "load_manifest", lambda folder: None)
    monkeypatch.setattr(megaresid.data.shards.TokenStream, "open", lambda *_: Counting())
    module = nanogpt.import_model(peer)
    monkeypatch.setattr(nanogpt, "import_model", lambda checkout: module)
    clock = iter([0.0, 2.0, 6.0, 7.0])
    monkeypatch.setattr(nanogpt, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    nanogpt.train(peer, tmp_path, steps=3, out=tmp_path / "rows", threads=1)

    (config,) = module.GPT.made
    assert config == module.GPTConfig(256, 50304, 4, 4, 128, 0.0, True)
    assert len(module.GPT.batches) == 3
    for x, y in module.GPT.batches:
        assert x.shape == y.shape == (8, 256)
        assert (y == x + 1).all() and (x[:, 1:] == x[:, :-1] + 1).all()
    assert len({int(x[row, 0]) for x, _ in module.GPT.batches for row in range(8)}) > 8
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["tokens_per_second"] for row in rows] == [2048 / 2, 2048 / 4, 2048 / 1]
    # SGD at rate 1 on w^2 from 3, its gradient of 6 (and then 4, 2) clipped to a norm of 1.
    assert [row["train_loss"] for row in rows] == pytest.approx([9, 4, 1], rel=1e-5)


def test_a_line_that_is_still_being_written_is_not_read(tmp_path):
    file = tmp_path / "rows"
    assert read_rows(file) == []
    file.write_text('{"step": 0, "val_loss": 1}\n{"step": 1, "tokens_per_second": 5}\n{"step": 2, "tok')
    assert read_rows(file) == [{"step": 1, "tokens_per_second": 5}]


def process(tmp_path, speeds, wait=0.0, code=0):
    """A command that waits, writes one row, waits again, writes the others and exits with a code."""
    rows = "".join(json.dumps({"step": i + 1, "tokens_per_second": s}) + "\n" for i, s in enumerate(speeds))
    first, others = rows.splitlines(keepends=True)[:1], rows.splitlines(keepends=True)[1:]
    script = (
        f"import sys, time; f = open({str(tmp_path / 'rows')!r}, 'w', buffering=1); time.sleep({wait}); "
        f"f.writelines({first!r}); time.sleep({wait}); f.writelines({others!r}); print('last words'); sys.exit({code})"
    )
    return [sys.executable, "-c", script], tmp_path / "rows", tmp_path / "peer.log", {}


def test_speed_is_the_median_after_the_warm_up_and_start_up_ends_with_the_first_step(tmp_path):
    started = time.perf_counter()
    found = measure(*process(tmp_path, [1.0] * WARM_UP + [30.0, 10.0, 20.0], wait=0.5))
    assert found.tokens_per_second == 20.0
    assert 0.5 <= found.start_up <= time.perf_counter() - started - 0.4


@pytest.mark.parametrize("speeds, code", [([1.0] * 9, 3), ([1.0] * WARM_UP, 0), ([], 0)])
def test_a_side_that_fails_or_stops_early_is_no_measurement(tmp_path, speeds, code):
    with pytest.raises(UserError, match=f"peer ended with code {code} after {len(speeds)} steps: last words"):
        measure(*process(tmp_path, speeds, wait=0.2, code=code))


def test_the_ratio_is_taken_round_by_round():
    text = report([Measurement(9, s) for s in (300, 100, 200)], [Measurement(4, s) for s in (100, 100, 50)])
    assert "megaresid / nanoGPT: 3.00 (1.00 to 4.00 over 3 rounds)" in text
    assert [line.split()[1] for line in text.splitlines()[:2]] == ["200", "100"]


def test_what_cannot_be_compared_is_refused(peer, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text("{}")
    with pytest.raises(UserError, match="no model.py"):
        training.compare(tmp_path, tmp_path, deepspeed_config=config)
    with pytest.raises(UserError, match=f"at least 1 round of {WARM_UP + 1} steps"):
        training.compare(peer, tmp_path, steps=WARM_UP, deepspeed_config=config)
    with pytest.raises(UserError, match="--deepspeed-config"):
        training.compare(peer, tmp_path, deepspeed_config=tmp_path / "none.json")
    (peer / "model.py").write_text("x = 1")
    with pytest.raises(UserError, match="defines no GPT"):
        training.compare(peer, tmp_path, deepspeed_config=config)
