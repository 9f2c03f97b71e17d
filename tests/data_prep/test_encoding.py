import numpy as np
import pytest

from data_prep import encoding, pieces
from data_prep.encoding import encode_documents


class Letters:
    """A backend whose ids are the bytes."""

    name = "letters"

    def encode(self, text):
        assert len(text) <= pieces.PIECE_BYTES
        return np.frombuffer(text, np.uint8)


def whole(document):
    return [50256, *document]


@pytest.mark.parametrize("group", [1, 2, 64])
def test_documents_become_their_ids_in_order(monkeypatch, group):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    monkeypatch.setattr(encoding, "PIECES", group)
    documents = [b"short", b"ten bytes.", b"eleven byte", b"a", b"b c", b"words and more words", b"x" * 35, b"last"]
    found = list(encode_documents(Letters(), documents))
    assert [id for encoded in found for id in encoded.ids.tolist()] == [id for d in documents for id in whole(d)]
    assert all(encoded.ids.dtype == np.uint16 for encoded in found)
    assert [document for encoded in found for document in encoded.documents] == documents
    assert [count for encoded in found for count in encoded.tokens] == [len(d) + 1 for d in documents]
    assert sum(encoded.cuts for encoded in found) == 3
    # A document is counted with its last ids.
    total = ended = 0
    for encoded in found:
        total += len(encoded.ids)
        ended += sum(encoded.tokens)
        assert ended == total if encoded.documents else ended < total
    if group == 1:
        assert max(len(encoded.ids) for encoded in found if len(encoded.documents) < 2) <= 11


def test_short_documents_are_encoded_together():
    (encoded,) = encode_documents(Letters(), [b"a", b"bc"])
    assert encoded.ids.tolist() == [50256, 97, 50256, 98, 99] and encoded.tokens == [2, 3]
    assert list(encode_documents(Letters(), [])) == []
