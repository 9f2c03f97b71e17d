"""Makes a unit into a part: reads its documents, encodes them, and writes what they became."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.backends import BackendName, Tiktoken, open_backend
from data_prep.encoding import Encoded, encode_documents
from data_prep.parts import DOCUMENT, PartRecord, PartWriter
from data_prep.proof import Proof
from data_prep.sources.source import Reader, Segment, Unit, Unreadable
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

        A file of the unit that cannot be read to its end raises Unreadable; with skip_unreadable what the unit has of
        it is left out whole. Raises UserError where the backend and tiktoken differ.
        """
        left_out: list[Segment] = []
        while True:
            try:
                return self._make_part(unit, left_out, report)
            except Unreadable as error:
                found = [segment for segment in unit.segments if segment.name == error.name and segment not in left_out]
                if not (self.options.skip_unreadable and found):
                    raise
                left_out += found
                print(f"left out: {error.name}: cannot be read", file=sys.stderr, flush=True)

    def _make_part(self, unit: Unit, left_out: list[Segment], report: Report) -> PartRecord:
        tally: Counter[str] = Counter(unreadable=len(left_out))
        readable = tuple(segment for segment in unit.segments if segment not in left_out)
        proof = None if self.backend is self._checker else Proof(unit.name, self.backend, self._checker)
        documents = tokens = text_bytes = cuts = 0
        writer = PartWriter(self.options.parts, unit, self.options.plan)
        try:
            for batch in self.options.reader.read(replace(unit, segments=readable), tally):
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
            for segment in readable:
                segment.check_size()
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

