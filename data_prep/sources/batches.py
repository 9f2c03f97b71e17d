"""Gathers documents into batches."""

from collections.abc import Iterable, Iterator

from data_prep.sources.source import BATCH_BYTES, BATCH_ROWS, Batch


def in_batches(documents: Iterable[tuple[bytes, int]]) -> Iterator[Batch]:
    """Batches of about BATCH_BYTES and at most BATCH_ROWS from (document, bytes of the unit read so far).

    A document that would make a batch too large begins the next: a long one is alone in its batch.
    """
    gathered: list[bytes] = []
    size = position = 0
    for document, position_after in documents:
        if gathered and (size + len(document) > BATCH_BYTES or len(gathered) == BATCH_ROWS):
            yield Batch(gathered, position)
            gathered, size = [], 0
        gathered.append(document)
        size += len(document)
        position = position_after
        del document
    if gathered:
        yield Batch(gathered, position)
