"""Documents to ids, <|endoftext|> first in each."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from data_prep import pieces
from data_prep.backends import Backend
from data_prep.tokenizer import END_OF_TEXT

START = np.array([END_OF_TEXT], np.uint16)
# Pieces of a long document that are encoded together: about 4 MiB.
PIECES = 64


class Encoded(NamedTuple):
    """Some more ids, uint16[n]; the documents that end with them, and how many ids each of these has in all; and how
    many endless pre-tokens were cut in them. Only a single document can have begun before these ids."""

    ids: np.ndarray
    documents: list[bytes]
    tokens: list[int]
    cuts: int


def encode_documents(backend: Backend, documents: list[bytes]) -> Iterator[Encoded]:
    """The ids of the documents, in order: those of short ones together, those of a long one bit by bit."""
    short: list[bytes] = []
    for document in documents:
        if len(document) <= pieces.PIECE_BYTES:
            short.append(document)
            continue
        if short:
            yield _encode_short(backend, short)
            short = []
        yield from _encode_long(backend, document)
    if short:
        yield _encode_short(backend, short)


def _encode_short(backend: Backend, documents: list[bytes]) -> Encoded:
    found = [backend.encode(document) for document in documents]
    ids = _joined([ids for document in found for ids in (START, document)])
    return Encoded(ids, documents, [len(document) + 1 for document in found], 0)


def _encode_long(backend: Backend, document: bytes) -> Iterator[Encoded]:
    cut, begun, tokens, left = pieces.cut(document), [START], 0, len(document)
    while left:
        group = list(islice(cut, PIECES))
        ids = _joined([*begun, *(backend.encode(piece) for piece, _ in group)])
        begun, tokens = [], tokens + len(ids)
        left -= sum(len(piece) for piece, _ in group)
        ended = ([], []) if left else ([document], [tokens])
        yield Encoded(ids, *ended, sum(inside for _, inside in group))


def _joined(ids: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(ids, dtype=np.uint16, casting="unsafe")
