"""What turns text into ids: tiktoken, or gigatoken where it is installed. Both give the same ids."""

import re
import resource
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from data_prep.tokenizer import Ranks, encoding_of, ranks_text
from megaresid.errors import UserError

if TYPE_CHECKING:
    import gigatoken

BackendName = Literal["auto", "tiktoken", "gigatoken"]
# Letters and numbers since Unicode 17, which gigatoken 0.10 knows and tiktoken does not: first and last of each range.
NEW_CHARACTERS = """
088F-088F 0C5C-0C5C 0CDC-0CDC A7CE-A7CF A7D2-A7D2 A7D4-A7D4 A7F1-A7F1 10940-10959 10EC5-10EC7 11DB0-11DDB 11DE0-11DE9
16EA0-16EB8 16EBB-16ED3 16FF2-16FF6 187F8-187FF 18D09-18D1E 18D80-18DF2 1E6C0-1E6DE 1E6E0-1E6E2 1E6E4-1E6E5 1E6E7-1E6ED
1E6F0-1E6F4 1E6FE-1E6FF 2B73A-2B73F 2CEA2-2CEAD 323B0-33479
"""
NEW_RANGES = [tuple(int(end, 16) for end in pair.split("-")) for pair in NEW_CHARACTERS.split()]
NEW = re.compile(f"[{''.join(f'{chr(first)}-{chr(last)}' for first, last in NEW_RANGES)}]")
# What they begin with in UTF-8, one byte and two: most texts have none of these, and that is seen sooner.
NEW_PAIRS = {chr(point).encode()[:2] for first, last in NEW_RANGES for point in range(first, last + 1)}
NEW_LEADS = {pair[:1] for pair in NEW_PAIRS}
# How much text is encoded between two looks at the memory, and by how much that may have grown.
CHECKED_BYTES = 4 * 2**20
MOST_GROWTH = 128 * 2**20


class Backend(Protocol):
    """``encode``: the ids of a text in valid UTF-8, integers[n]; "<|endoftext|>" in it is ordinary text."""

    name: str

    def encode(self, text: bytes) -> np.ndarray: ...


class Tiktoken:
    name = "tiktoken"

    def __init__(self, ranks: Ranks):
        self._encoding = encoding_of(ranks)

    def encode(self, text: bytes) -> np.ndarray:
        # Faster than ``encode_ordinary``, which makes a list.
        return self._encoding.encode_to_numpy(text.decode("utf-8"), disallowed_special=())


class Gigatoken:
    """gigatoken, made to give tiktoken's ids.

    Text with NEW_CHARACTERS is left to tiktoken: "'ll" after such a letter is a contraction to one only. gigatoken
    remembers every pre-token that it has seen, up to 10 bytes a byte of text, for ever: so it is made anew where the
    memory of this process has grown by MOST_GROWTH.
    """

    name = "gigatoken"

    def __init__(self, ranks: Ranks, tiktoken: Tiktoken):
        self._ranks, self._tiktoken = ranks, tiktoken
        self._renew()

    def encode(self, text: bytes) -> np.ndarray:
        if has_new_characters(text):
            return self._tiktoken.encode(text)
        self._unchecked += len(text)
        if self._unchecked > CHECKED_BYTES:
            if resident_bytes() > self._resident + MOST_GROWTH:
                self._renew()
            self._unchecked = 0
        # Faster than ``encode_batch``, whose answer takes longer to take apart.
        return self._tokenizer.encode(text)

    def _renew(self) -> None:
        self._tokenizer = None  # before there are two
        self._tokenizer = load_gigatoken(self._ranks)
        self._unchecked, self._resident = 0, resident_bytes()


def load_gigatoken(ranks: Ranks) -> "gigatoken.Tokenizer":
    """Raises ImportError where it is not installed."""
    import gigatoken

    with tempfile.TemporaryDirectory(prefix="megaresid-vocabulary-") as folder:
        file = Path(folder) / "gpt2.tiktoken"
        file.write_bytes(ranks_text(ranks))
        # With its default special tokens a "<|endoftext|>" in the text would become the id that parts documents.
        return gigatoken.Tokenizer.from_tiktoken(file, pretokenizer="gpt2", special_tokens={})


def has_new_characters(text: bytes) -> bool:
    if text.isascii() or not any(lead in text for lead in NEW_LEADS) or not any(pair in text for pair in NEW_PAIRS):
        return False
    return NEW.search(text.decode("utf-8")) is not None


def resident_bytes() -> int:
    """The memory that this process has now; where the system does not say, the most that it ever had."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def open_backend(name: BackendName, ranks: Ranks, tiktoken: Tiktoken) -> Backend:
    """The backend of this name: ``tiktoken``, or one that gives its ids. auto is gigatoken where it can be imported;
    UserError where it was named and cannot."""
    if name != "tiktoken":
        try:
            return Gigatoken(ranks, tiktoken)
        except ImportError as error:
            if name == "gigatoken":
                raise UserError(
                    f"--tokenizer-backend gigatoken: {error}; install the extra [fast], or use auto"
                ) from None
    return tiktoken
