import hashlib
import random

import numpy as np
import pytest

from data_prep.encoding import encode_documents
from data_prep.pieces import PIECE_BYTES
from data_prep.proof import CANDIDATES, SAMPLED, Proof
from megaresid.errors import UserError


class Honest:
    """ids are the bytes, and what was encoded is kept."""

    name = "honest"

    def __init__(self):
        self.seen = []

    def encode(self, text):
        self.seen.append(text)
        return np.frombuffer(text, np.uint8).astype(np.uint32)


class Liar(Honest):
    """Changes id ``place`` where ``lies_on`` says so, or leaves it and what follows out."""

    name = "liar"

    def __init__(self, lies_on, place, shorten=False):
        super().__init__()
        self.lies_on, self.place, self.shorten = lies_on, place, shorten

    def encode(self, text):
        ids = super().encode(text)
        if self.lies_on(text):
            if self.shorten:
                return ids[: self.place]
            ids[self.place] = 200
        return ids


def documents_of(seed, count, least=100, most=400):
    generator = random.Random(seed)
    return [b"%d " % n + b"w" * generator.randrange(least, most) for n in range(count)]


def word(document):
    return int(hashlib.sha256(document).hexdigest()[16:32], 16)


def sample_of(documents):
    """By definition."""
    sample, total, taken = [], 0, 0
    for document in documents:
        total += len(document)
        if word(document) < 2**64 // CANDIDATES and len(document) <= PIECE_BYTES:
            if (taken + len(document)) * SAMPLED <= total:
                sample.append(document)
                taken += len(document)
    return sample


def prove(documents, backend, checker, batch):
    proof = Proof("000000-000007", backend, checker)
    for start in range(0, len(documents), batch):
        for encoded in encode_documents(backend, documents[start : start + batch]):
            digests = b"".join(hashlib.sha256(document).digest() for document in encoded.documents)
            proof.check(encoded, np.frombuffer(digests, ">u8").reshape(-1, 4))
    proof.finish()
    return proof


@pytest.mark.parametrize("batch", [1, 7, 5000])
def test_the_sample_follows_from_the_part_alone(batch):
    documents = documents_of(0, 5000)
    documents.insert(3000, b"long " * PIECE_BYTES)
    checker = Honest()
    proof = prove(documents, Honest(), checker, batch)
    assert checker.seen == sample_of(documents) and len(checker.seen) > 20
    assert proof.bytes == sum(map(len, checker.seen)) <= 0.005 * sum(map(len, documents))


@pytest.mark.parametrize("shorten", [False, True])
def test_one_rare_lie_is_found_and_told(shorten):
    documents = documents_of(1, 5000)
    lied = sample_of(documents)[-1]
    number, digest = documents.index(lied), hashlib.sha256(lied).hexdigest()
    backend = Liar(lambda text: text == lied, 50, shorten)
    with pytest.raises(UserError) as error:
        prove(documents, backend, Honest(), 100)
    found = "none" if shorten else "200"
    assert str(error.value).startswith(
        f"part 000000-000007, document {number} (sha256 {digest}, it begins {lied.decode()[:40]!r}): liar differs from "
        f"tiktoken, its id 50 is {found}, tiktoken's {ord('w')};"
    )


def test_a_lie_that_is_longer():
    documents = documents_of(1, 5000)
    lied = sample_of(documents)[0]
    with pytest.raises(UserError, match=f"its id 50 is {ord('w')}, tiktoken's none;"):
        prove(documents, Honest(), Liar(lambda text: text == lied, 50, shorten=True), 100)


@pytest.mark.parametrize("sizes", [[300], [300, 250, 60_000], [2_000_000], [70_000, 30_000_000]])
def test_a_small_part_has_a_slice_compared_by_both(sizes):
    documents = [b"%d" % size + "字".encode() * (size // 3) for size in sizes]
    assert not sample_of(documents)
    backend, checker = Honest(), Honest()
    proof = prove(documents, backend, checker, 1)
    first = min(documents, key=word)
    room = min(sum(map(len, documents)) // SAMPLED, PIECE_BYTES)
    (compared,) = checker.seen
    assert backend.seen[-1] == compared and first.startswith(compared)
    assert room - 3 < len(compared) == proof.bytes <= room
    compared.decode()
    with pytest.raises(UserError, match=rf"document {documents.index(first)} .* its id 0 is 200"):
        prove(documents, Liar(lambda text: text == compared, 0), Honest(), 1)


def test_too_small_for_any():
    checker = Honest()
    assert prove([b"x" * (SAMPLED - 1)], Honest(), checker, 1).bytes == prove([], Honest(), checker, 1).bytes == 0
    assert not checker.seen
    assert prove([b"x" * SAMPLED], Honest(), checker, 1).bytes == 1
