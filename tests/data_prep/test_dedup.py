import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import dedup
from data_prep.dedup import SeenDigests

# Few values, so that they meet again; the first words collide where the second do not, and the last two never count.
EDGES = [0, 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]
words = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
digest = st.tuples(words, words, st.integers(0, 3), st.integers(0, 3))
streams = st.lists(st.lists(digest, max_size=30), max_size=12)


def first_of_each(batches):
    """By definition: new where no earlier digest of any batch has the same first two words."""
    seen, answers = set(), []
    for batch in batches:
        answers.append([])
        for key in batch:
            answers[-1].append(key[:2] not in seen)
            seen.add(key[:2])
    return answers


def as_array(batch, kind=">u8"):
    return np.array(batch, dtype=np.dtype(kind)).reshape(-1, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("seen") / "seen"


@settings(deadline=None, max_examples=150)
@given(streams, st.sampled_from([0, 3, 2**20]), st.sampled_from([1, 2, 7]), st.sampled_from([1, 2, 5]))
def test_the_first_of_each_is_new(folder, batches, in_memory, at_once, stride):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dedup, "MEMORY_DIGESTS", in_memory)
        patch.setattr(dedup, "MERGE_DIGESTS", at_once)
        patch.setattr(dedup, "STRIDE", stride)
        seen = SeenDigests(folder)
        answers = [seen.add(as_array(batch)).tolist() for batch in batches]
        assert answers == first_of_each(batches)
        assert sum(map(len, seen._runs)) == len({key[:2] for batch in batches for key in batch})
        seen.close()
    assert not folder.exists()


def test_many_digests_in_runs_on_disk(folder, monkeypatch):
    monkeypatch.setattr(dedup, "MEMORY_DIGESTS", 1000)
    monkeypatch.setattr(dedup, "MERGE_DIGESTS", 300)
    monkeypatch.setattr(dedup, "LOOKUPS", 100)
    random = np.random.default_rng(0)
    batches = []
    for number in range(60):
        texts = random.integers(0, 40_000, size=int(random.integers(1, 1200)))
        batches.append([tuple(np.frombuffer(hashlib.sha256(b"%d" % text).digest(), ">u8").tolist()) for text in texts])
    seen = SeenDigests(folder)
    assert [seen.add(as_array(batch)).tolist() for batch in batches] == first_of_each(batches)
    sizes = [len(run) for run in seen._runs]
    assert sum(sizes) > 10_000 and len(sizes) < 12 and all(a > 2 * b for a, b in zip(sizes, sizes[1:], strict=False))
    on_disk = sorted(path.stat().st_size for path in folder.iterdir())
    assert on_disk == sorted(16 * size for size in sizes if size > 1000)
    seen.close()


def test_what_an_earlier_job_left_is_not_seen(folder):
    SeenDigests(folder).add(as_array([(1, 2, 3, 4)]))
    (folder / "000001.run").write_bytes(bytes(16))
    seen = SeenDigests(folder)
    assert not list(folder.iterdir())
    assert seen.add(as_array([(1, 2, 3, 4), (0, 0, 0, 0)])).tolist() == [True, True]
    seen.close()
