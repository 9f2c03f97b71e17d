"""The benchmark of loading: its sparse data set, what its numbers mean, and the command at work."""

import json
import os
import struct
import time
from pathlib import Path

import pytest

from megaresid.benchmark import loading
from megaresid.benchmark.loading import Request, compute, main, make_sparse, missed, opening, reading, waiting
from megaresid.data.loader import Loader
from megaresid.data.mixture import open_data
from megaresid.errors import UserError

SMALL = {"sparse_tokens": 70_000, "context": 16, "micro_batch": 4, "global_batch": 8, "steps": 3}


@pytest.fixture
def sparse(tmp_path):
    folder = tmp_path / "sparse"
    folder.mkdir()
    make_sparse(folder, 70_000, shard_tokens=30_000)
    return open_data([folder], vocab_size=50257, validating=False)


def test_the_sparse_data_set_is_one_and_takes_no_room(sparse):
    (folder,) = sparse.folders
    assert [shard.tokens for shard in folder.training.shards] == [30_000, 30_000, 10_000]
    assert not folder.training.read(0, 70_000).any()
    files = [folder.path / shard.name for shard in folder.training.shards]
    assert [os.stat(file).st_size for file in files] == [61_024, 61_024, 21_024]


@pytest.mark.full
def test_a_folder_of_10_billion_tokens_opens_in_less_than_a_second(tmp_path):
    make_sparse(tmp_path, 10_000_000_000)
    assert len(list(tmp_path.glob("train_*.bin"))) == 100
    assert min(opening(lambda: open_data([tmp_path], vocab_size=50257, validating=False))) < 1


class Clock:
    """A clock that moves only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = self.cpu = 0.0
        monkeypatch.setattr(loading.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(loading.time, "thread_time", lambda: self.cpu)


def test_the_speed_is_of_the_tokens_after_the_first_round(sparse, monkeypatch):
    """1024 samples a round of 256 batches of 4 x 16 tokens; 2 seconds and 1 CPU second a batch, 1000 more the first."""
    import megaresid.data.loader

    clock, batches = Clock(monkeypatch), []

    def read_batch(stream, windows, context, vocab_size):
        batches.append(windows)
        clock.now += 2 if len(batches) > 1 else 1000
        clock.cpu += 1 if len(batches) > 1 else 1000

    monkeypatch.setattr(megaresid.data.loader, "read_batch", read_batch)
    found = reading(sparse, Request(**SMALL | {"steps": 3 * 128}), 50257)
    assert len(batches) == 3 * 256 and all(len(windows) == 4 for windows in batches)
    assert found == {"tokens_per_second": 64 / 2, "tokens_per_cpu_second": 64.0}


def test_waiting_is_the_time_in_next_as_a_share_of_the_steps_after_the_first(sparse, monkeypatch):
    """Two batches a step, each of 4 seconds by 16 tokens per second; it waits for 1 (in the first step for 1000), and
    works for 5."""
    clock, asked, real = Clock(monkeypatch), [], Loader.__next__

    def slow(loader):
        asked.append(0)
        clock.now += 1 if len(asked) > 2 else 1000
        return real(loader)

    monkeypatch.setattr(Loader, "__next__", slow)
    work = []

    def consume(seconds):
        work.append(seconds)
        clock.now += 5

    found = waiting(sparse, Request(**SMALL | {"tokens_per_second": 16}), 50257, consume)
    assert found["waiting"] == 1 / 4 and found["step_seconds"] == 12.0
    assert work == [4.0] * 8 and len(asked) == 8


def test_the_cpu_time_is_that_of_the_loaders_thread(sparse, monkeypatch):
    """A reader that computes for 5 ms of CPU time a batch, and a loop that takes its time asleep or at work itself."""
    import megaresid.data.loader

    real = megaresid.data.loader.read_batch

    def read_batch(stream, windows, context, vocab_size):
        end = time.thread_time() + 5e-3 * len(windows) / 4
        while time.thread_time() < end:
            pass
        return real(stream, windows, context, vocab_size)

    monkeypatch.setattr(megaresid.data.loader, "read_batch", read_batch)
    monkeypatch.setattr(megaresid.data.loader, "TOKENS_AT_ONCE", 4 * 16)
    # 64 tokens in 20 ms: the thread needs 5 of them.
    request = Request(**SMALL | {"tokens_per_second": 3200, "steps": 10})
    for consume in (loading.sleep, compute):
        found = waiting(sparse, request, 50257, consume)
        assert 0.5 < found["cpu"] * 2 * 20e-3 / (2 * 5e-3) < 2
        assert found["step_seconds"] >= 2 * 20e-3


def test_the_goals():
    loop = {"waiting": 0.001, "cpu": 0.009}
    found = {"opening_seconds": [9.0, 0.1, 0.2], "sleeping": loop, "computing": loop}
    assert missed(found) == []
    worse = found | {"opening_seconds": [0.1, 1.0, 2.0], "computing": {"waiting": 0.01, "cpu": 0.0}}
    assert missed(worse) == ["opening takes 1 s or more", "waiting takes 1% or more of the computing loop"]


def test_the_command_on_sparse_and_on_real_data(tmp_path, capsys):
    kept = tmp_path / "made" / "loading.json"
    with_goals(Request(**SMALL, json=kept))
    tree = json.loads(kept.read_text())
    assert tree["training_tokens"] == 70_000 and tree["shards"] == 1 and len(tree["opening_seconds"]) == 5
    assert tree["options"]["context"] == 16 and "versions" in tree["environment"]
    assert tree["missed"] == missed(tree) and "aligned_distinct" not in tree
    said = capsys.readouterr().out
    assert "opening " in said and "70,000 tokens in 1 shard(s)" in said and "computing loop" in said

    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        folder.mkdir()
        make_sparse(folder, 1200)
        with open(folder / "train_000000.bin", "r+b") as file:
            file.seek(1024)
            file.write(struct.pack("<1200H", *[50256, 1, 1, 1, 1, 1] * 200))
    options = {"data": folders, "data_weights": (1.0, 3.0), "data_order": "sequential", "align_documents": True}
    with_goals(Request(**SMALL | options, json=tmp_path / "real.json"))
    found = json.loads((tmp_path / "real.json").read_text())["aligned_distinct"]
    # Windows of 16 every 16 tokens begin at the next multiple of 6.
    starts = [-(-16 * window // 6) * 6 for window in range(74)]
    seen = {token for start in starts for token in range(start, start + 16)}
    assert found[str(folders[0])] == {"windows": 74, "share": pytest.approx(len(seen) / (74 * 16))}
    assert len(seen) < 74 * 16


def with_goals(request: Request) -> None:
    """Run the command; in so small a case the goals need not be met."""
    try:
        main(request)
    except SystemExit as exit:
        assert exit.code == 1


@pytest.mark.parametrize(
    "options, says",
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"tokens_per_second": -1}, "--tokens-per-second -1"),
        ({"global_batch": 9}, "--global-batch 9: must be a multiple of --micro-batch 4"),
        ({"sparse_tokens": 100}, "fewer than one global batch of 8"),
        ({"data": (Path("nowhere"),)}, "data folder nowhere: no such folder"),
    ],
)
def test_what_cannot_be_measured(options, says):
    with pytest.raises(UserError, match=says):
        main(Request(**SMALL | options))
