"""What turns text into ids: tiktoken, or gigatoken where it is installed. Both give the same ids."""

import tempfile
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from data_prep.tokenizer import Ranks, encoding_of, ranks_text
from megaresid.errors import UserError

BackendName = Literal["auto", "tiktoken", "gigatoken"]


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
    name = "gigatoken"

    def __init__(self, ranks: Ranks):
        import gigatoken

        with tempfile.TemporaryDirectory(prefix="megaresid-vocabulary-") as folder:
            file = Path(folder) / "gpt2.tiktoken"
            file.write_bytes(ranks_text(ranks))
            # With its default special tokens a "<|endoftext|>" in the text would become the id that parts documents.
            self._tokenizer = gigatoken.Tokenizer.from_tiktoken(file, pretokenizer="gpt2", special_tokens={})

    def encode(self, text: bytes) -> np.ndarray:
        # Faster than ``encode_batch``, whose answer takes longer to take apart.
        return self._tokenizer.encode(text)


def open_backend(name: BackendName, ranks: Ranks) -> Backend:
    """The backend of this name; auto is gigatoken where it can be imported. UserError where one that is named cannot."""
    if name != "tiktoken":
        try:
            return Gigatoken(ranks)
        except ImportError as error:
            if name == "gigatoken":
                raise UserError(
                    f"--tokenizer-backend gigatoken: {error}; install the extra [fast], or use auto"
                ) from None
    return Tiktoken(ranks)
