"""The data of a run: what several folders are together, told by plain loops over their tokens."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaresid.data.blend import Blend, shares
from megaresid.data.loader import Loader
from megaresid.data.manifest import load_manifest
from megaresid.data.mixture import open_data, proportional
from megaresid.data.sampler import Sampler
from megaresid.errors import UserError
from megaresid.evaluation.validation import count_windows

CONTEXT = 5
GENERATOR = np.random.default_rng(0)
TRAIN = [GENERATOR.integers(start, start + 100, size).tolist() for start, size in ((0, 151), (100, 60), (200, 333))]
VAL = [GENERATOR.integers(start, start + 100, size).tolist() for start, size in ((300, 41), (400, 26), (500, 200))]


@pytest.fixture
def folders(tmp_path, write_data_set):
    found = []
    for number, (train, val) in enumerate(zip(TRAIN, VAL)):
        shards = {"train_000000.bin": train[:50], "train_000001.bin": train[50:], "val_000000.bin": val}
        found.append(write_data_set(tmp_path / f"set{number}", shards))
    return found


def opened(folders, *options, vocab_size=50257, validating=True):
    return open_data(folders, *options, vocab_size=vocab_size, validating=validating)


def read_all(data, steps=30):
    options = {"context": CONTEXT, "global_batch": 8, "micro_batch": 4, "ranks": 1, "rank": 0, "vocab_size": 50257}
    with Loader(data.training(CONTEXT), data.sampler(CONTEXT, 3), last_step=steps, **options) as loader:
        return [row for idx, _ in loader for row in idx.tolist()]


@pytest.mark.parametrize("order", ["shuffled", "sequential"])
def test_the_sequences_of_a_run_by_plain_loops(folders, order):
    """Sample s is of the folder that the blend gives it, and there the window that the folder's own sampler gives."""
    blend = Blend((Fraction(5, 10), Fraction(2, 10), Fraction(3, 10)), 3, order)
    samplers = [Sampler((len(tokens) - 1) // CONTEXT, 3, order, number) for number, tokens in enumerate(TRAIN)]
    wanted = []
    for sample in range(240):
        (folder,), own = blend.assign(np.array([sample]))
        (window,) = samplers[folder].window_of(own)
        wanted.append(TRAIN[folder][window * CONTEXT : (window + 1) * CONTEXT])
    assert read_all(opened(folders, [0.5, 0.2, 0.3], order)) == wanted


def test_one_folder_is_read_as_it_always_was(folders):
    data = opened(folders[:1])
    order = Sampler(30, seed=3).window_of(np.arange(240)).tolist()
    assert read_all(data) == [TRAIN[0][w * CONTEXT : (w + 1) * CONTEXT] for w in order]
    assert data.identity == load_manifest(folders[0]).identity
    assert opened(folders[:1], [7.0]).identity == data.identity
    assert data.validation(CONTEXT, 100).read(0, 41).tolist() == VAL[0]
    sequential = [TRAIN[0][w * CONTEXT : (w + 1) * CONTEXT] for w in range(30)]
    assert read_all(opened(folders[:1], (), "sequential")) == sequential * 8


def test_without_weights_the_shares_are_those_of_the_tokens(folders):
    assert [folder.share for folder in opened(folders).folders] == [Fraction(n, 544) for n in (151, 60, 333)]
    assert opened(folders).identity == opened(folders, [151, 60, 333]).identity


def test_every_other_data_order_or_weight_is_another_identity(folders):
    variants = [
        opened(folders[:1]),
        opened(folders[1:2]),
        opened(folders[:1], (), "sequential"),
        opened(folders[:1], (), "shuffled", True),
        opened(folders[:1], (), "sequential", True),
        opened(folders[:2]),
        opened(folders[:2], [1, 1]),
        opened(folders[:2], [1, 1], "sequential"),
        opened(folders[:2], [1, 1], "shuffled", True),
        opened(folders[:2], [1, 2]),
        opened(folders[1::-1], [1, 1]),
        opened([folders[0], folders[2]], [1, 1]),
        opened(folders, [1, 1, 1]),
    ]
    identities = [data.identity for data in variants]
    assert len(set(identities)) == len(identities) and all(len(identity) == 64 for identity in identities)
    assert opened(folders[:2], [0.25, 0.75]).identity == opened(folders[:2], [1, 3]).identity


def test_aligned_windows_of_several_folders(tmp_path, write_data_set):
    streams = [[1, 50256, 3, 4, 5, 6, 7, 8, 9, 10, 11], [21, 22, 23, 24, 25, 26, 27, 50256, 29, 30, 31]]
    folders = [write_data_set(tmp_path / str(n), {"train_000000.bin": ids}) for n, ids in enumerate(streams)]
    data = opened(folders, [1, 1], "sequential", True, validating=False)
    assert [row for row in read_all(data, 1)[:4]] == [
        [50256, 3, 4, 5, 6], [21, 22, 23, 24, 25], [6, 7, 8, 9, 10], [26, 27, 50256, 29, 30],
    ]  # fmt: skip


@settings(deadline=None)
@given(
    kinds=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 300)), min_size=1, max_size=5),
    most=st.integers(0, 400),
)
def test_proportional_takes_as_many_as_there_can_be(kinds, most):
    parts, available = shares([weight for weight, _ in kinds]), [count for _, count in kinds]
    counts = proportional(parts, available, most)
    total = sum(counts)
    assert total <= most and all(0 <= count <= limit for count, limit in zip(counts, available, strict=True))
    assert all(abs(count - total * part) < 1 for count, part in zip(counts, parts))
    # More would be more than there is of some kind, but for one that its share misses by less than one.
    if total < most:
        assert any((total + 1) * part > limit - 1 for part, limit in zip(parts, available))


def test_validation_has_each_folder_in_proportion_and_no_window_twice(folders):
    """40, 25 and 199 predicted tokens hold 8, 5 and 39 windows of 5. Of 21 by shares of 1/4, 1/4, 1/2 the second gives
    floor(10.5) - floor(5.25) = 5, of 22 it would give 6."""
    data = opened(folders, [1, 1, 2], "shuffled", True)
    stream = data.validation(CONTEXT, 10**6)
    assert count_windows(stream, CONTEXT, 10**6) == 21
    rows = stream.read_windows(np.arange(21), CONTEXT).tolist()
    assert rows == [VAL[n][w * CONTEXT : w * CONTEXT + 6] for n, many in enumerate((5, 5, 11)) for w in range(many)]
    few = data.validation(CONTEXT, 8 * CONTEXT + 3)
    rows = few.read_windows(np.arange(count_windows(few, CONTEXT, 8 * CONTEXT + 3)), CONTEXT).tolist()
    assert rows == [VAL[n][w * CONTEXT : w * CONTEXT + 6] for n, many in enumerate((2, 2, 4)) for w in range(many)]
    assert opened(folders, [1, 1, 2], validating=False).validation(CONTEXT, 100) is None


def test_a_bad_id_names_the_shard_of_its_folder(folders):
    """The largest id stands in the third folder alone."""
    data, sizes = opened(folders, [1, 1, 1]), {"global_batch": 8, "micro_batch": 8, "ranks": 1, "rank": 0}
    sizes |= {"context": CONTEXT, "vocab_size": max(TRAIN[2]), "last_step": 100}
    with Loader(data.training(CONTEXT), data.sampler(CONTEXT, 3), **sizes) as loader:
        with pytest.raises(UserError, match=r"set2/train_(\d+).bin: token (\d+) is id (\d+)") as caught:
            list(loader)
    shard, offset, found = map(int, re.search(r"train_(\d+).bin: token (\d+) is id (\d+)", str(caught.value)).groups())
    assert found == max(TRAIN[2]) == TRAIN[2][50 * shard + offset]


def test_capacity_is_of_each_folder(folders):
    data = opened(folders, [1, 8, 1])
    data.check_capacity(CONTEXT, 13)
    with pytest.raises(UserError, match=r"set1: 60 tokens give 11 sequences of 5, fewer than its share \(0.8\) of one"):
        data.check_capacity(CONTEXT, 14)
    with pytest.raises(UserError, match="fewer than one global batch of 31"):
        opened(folders[:1]).check_capacity(CONTEXT, 31)


def test_mistakes(folders, tmp_path, write_data_set):
    with pytest.raises(UserError, match=r"--data-weights 1 2: 2 for 3 folders"):
        opened(folders, [1, 2])
    with pytest.raises(UserError, match="set0 is named 2 times"):
        opened([*folders, folders[0].parent / "set1" / ".." / "set0"])
    with pytest.raises(UserError, match="outside the vocabulary of 250"):
        opened(folders, vocab_size=250)
    alone = write_data_set(tmp_path / "alone", {"train_000000.bin": TRAIN[0]})
    with pytest.raises(UserError, match="alone: it has no val shards"):
        opened([folders[0], alone])
    opened([folders[0], alone], validating=False)
    short = write_data_set(tmp_path / "short", {"train_000000.bin": TRAIN[0], "val_000000.bin": VAL[0][:5]})
    with pytest.raises(UserError, match="short: its 5 validation tokens hold no window of 6"):
        opened([folders[0], short]).validation(CONTEXT, 100)


def test_folders_of_different_tokenizers(folders):
    path = folders[2] / "manifest.json"
    path.write_text(path.read_text().replace('"sha256": "' + "0" * 64, '"sha256": "' + "1" * 64, 1))
    opened(folders[:2])
    opened(folders[2:])
    with pytest.raises(UserError, match=r"set2 was tokenized with another vocabulary than \S*set0"):
        opened(folders)


def test_what_is_recorded_and_said(folders):
    data = opened(folders[:2], [3, 1], "sequential")
    record = json.loads(json.dumps(data.record()))
    assert record["identity"] == data.identity and record["order"] == "sequential"
    assert (record["training_tokens"], record["validation_tokens"]) == (211, 67)
    assert [
        (entry["folder"], entry["share"], entry["training_tokens"], entry["validation_tokens"], entry["identity"])
        for entry in record["folders"]
    ] == [
        (str(folders[0]), "3/4", 151, 41, load_manifest(folders[0]).identity),
        (str(folders[1]), "1/4", 60, 26, load_manifest(folders[1]).identity),
    ]
    # 30 and 11 windows: 75 of 100 sequences are 2.5 epochs of the first, 25 are 2.27 of the second.
    first, *lines = data.describe(100, CONTEXT)
    assert first == f"211 training and 67 validation tokens, in sequential order, identity {data.identity[:12]}"
    assert lines == [f"0.7500 from {folders[0]}, 2.50 epochs", f"0.2500 from {folders[1]}, 2.27 epochs"]
    assert len(opened(folders[:1]).describe(100, CONTEXT)) == 1
