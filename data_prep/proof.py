"""The proof of a fast backend: tiktoken encodes a sample of each part too, and one difference stops the job."""

import numpy as np

from data_prep.backends import Backend
from data_prep.encoding import Encoded
from data_prep.pieces import PIECE_BYTES, whole_characters
from megaresid.errors import UserError

# At most one byte of a part in so many is compared.
SAMPLED = 200
# One document in so many, by its digest, may be of the sample: more than there is room for.
CANDIDATES = 100
SHOWN_CHARACTERS = 40


class Proof:
    """Compares ids of one part's documents with those of ``checker``, tiktoken.

    Which documents are compared follows from the part alone, whatever batches they come in: candidates are chosen by
    the second word of their digest, and taken while the sample stays within its share of the text so far. ``bytes``
    counts the text that was compared.
    """

    def __init__(self, part: str, backend: Backend, checker: Backend):
        self._part, self._backend, self._checker = part, backend, checker
        self.bytes = self._documents = self._text_bytes = 0
        # Of the document that comes first by that word: the word, its number, its digest and its beginning.
        self._first = (2**64, 0, "", b"")

    def check(self, encoded: Encoded, digests: np.ndarray) -> None:
        """See the next documents, with their digests >u8[m, 4]. Raises UserError at a difference."""
        words = digests[:, 1].astype(np.uint64)
        lengths = np.fromiter(map(len, encoded.documents), np.int64, len(encoded.documents))
        totals = self._text_bytes + np.cumsum(lengths)
        ends = np.cumsum(encoded.tokens)
        for n in np.flatnonzero(words < 2**64 // CANDIDATES).tolist():
            if lengths[n] <= PIECE_BYTES and (self.bytes + lengths[n]) * SAMPLED <= totals[n]:
                ids = encoded.ids[ends[n] - encoded.tokens[n] + 1 : ends[n]]
                self._compare(encoded.documents[n], ids, self._documents + n, digests[n].tobytes().hex())
        if len(words) and words[n := int(words.argmin())] < self._first[0]:
            digest = digests[n].tobytes().hex()
            self._first = int(words[n]), self._documents + n, digest, encoded.documents[n][: PIECE_BYTES + 1]
        self._documents += len(lengths)
        self._text_bytes = int(totals[-1]) if len(totals) else self._text_bytes

    def finish(self) -> None:
        """End the part. One that was too small for a whole document of the sample has a slice of one compared."""
        _, number, digest, text = self._first
        room = min(self._text_bytes // SAMPLED, PIECE_BYTES)
        if not self.bytes and room:
            slice = text[: whole_characters(text, room)]
            self._compare(slice, self._backend.encode(slice), number, digest)

    def _compare(self, text: bytes, ids: np.ndarray, number: int, digest: str) -> None:
        expected = self._checker.encode(text)
        if not np.array_equal(ids, expected):
            shared = min(len(ids), len(expected))
            place = int(np.append(np.flatnonzero(ids[:shared] != expected[:shared]), shared)[0])
            found, right = (str(values[place]) if place < len(values) else "none" for values in (ids, expected))
            begins = text.decode("utf-8")[:SHOWN_CHARACTERS]
            raise UserError(
                f"part {self._part}, document {number} (sha256 {digest}, it begins {begins!r}): {self._backend.name} "
                f"differs from tiktoken, its id {place} is {found}, tiktoken's {right}; report this, and use "
                "--tokenizer-backend tiktoken"
            )
        self.bytes += len(text)
