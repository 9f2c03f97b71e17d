"""Makes a unit into a part: reads its documents, encodes them, and writes what they became."""

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.backends import BackendName, Tiktoken, open_backend
from data_prep.encoding import Encoded, encode_documents
from data_prep.parts import DOCUMENT, PartRecord, PartWriter
from data_prep.proof import Proof
from data_prep.sources.source import Reader, Unit, Unreadable
from data_prep.tokenizer import gpt2_ranks

# Called with the bytes of the unit that have been read, and the documents and tokens that were written of it.
Report = Callable[[int, int, int], None]


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker needs to know; small, and can be pickled. ``parts`` is the folder, ``plan`` the plan's sha256."""

    reader: Reader
    parts: Path
    plan: str
    vocab_file: Path | None = None
    backend: BackendName = "auto"
    skip_unreadable: bool = False


class Worker:
    """Makes parts, one after another. Raises UserError without a vocabulary, or without the backend that was named."""

    def __init__(self, options: WorkerOptions):
        self.options = options
        ranks = gpt2_ranks(options.vocab_file)
        self._checker = Tiktoken(ranks)
        self.backend = open_backend(options.backend, ranks, self._checker)

    def make_part(self, unit: Unit, report: Report = lambda position, documents, tokens: None) -> PartRecord:
        """Write the unit's part. Whatever goes wrong, ``report`` raising too, leaves nothing of it behind.

        A unit that cannot be read to its end raises Unreadable; with skip_unreadable it is left out whole, as a part
        without documents. Raises UserError where the backend and tiktoken differ.
        """
        try:
            return self._make_part(unit, self.options.reader.read, report)
        except Unreadable:
            if not self.options.skip_unreadable:
                raise
        return self._make_part(unit, _nothing, report)

    def _make_part(self, unit: Unit, read: Callable, report: Report) -> PartRecord:
        tally: Counter[str] = Counter()
        proof = None if self.backend is self._checker else Proof(unit.name, self.backend, self._checker)
        documents = tokens = text_bytes = cuts = 0
        writer = PartWriter(self.options.parts, unit, self.options.plan)
        try:
            for batch in read(unit, tally):
                for encoded in encode_documents(self.backend, batch.documents):
                    rows = rows_of(encoded)
                    if proof:
                        proof.check(encoded, rows["digest"])
                    writer.append(encoded.ids, rows)
                    documents += len(rows)
                    tokens += len(encoded.ids)
                    cuts += encoded.cuts
                    text_bytes += sum(map(len, encoded.documents))
                    report(batch.position, documents, tokens)
            if proof:
                proof.finish()
            return writer.finish(
                text_bytes=text_bytes,
                runs_cut=cuts,
                dropped={reason: count for reason, count in sorted(tally.items()) if count},
                backend=self.backend.name,
                proven_bytes=proof.bytes if proof else 0,
            )
        except BaseException:
            writer.discard()
            raise


def rows_of(encoded: Encoded) -> np.ndarray:
    """DOCUMENT[m]: a row for each document that ends here."""
    rows = np.empty(len(encoded.documents), DOCUMENT)
    digests = b"".join(hashlib.sha256(document).digest() for document in encoded.documents)
    rows["digest"] = np.frombuffer(digests, ">u8").reshape(-1, 4)
    rows["tokens"] = encoded.tokens
    return rows


def _nothing(unit: Unit, tally: Counter[str]):
    """In place of reading a unit that cannot be."""
    tally["unreadable"] += 1
    return ()
