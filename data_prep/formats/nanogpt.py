"""nanoGPT's data: train.bin and val.bin, nothing but uint16 ids, little-endian, <|endoftext|> after each document.

Its train.py maps the files and cuts windows out of them anywhere; its data/openwebtext/prepare.py writes them.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.formats.ids import appearing, check_raw_ids, read_raw_ids
from megaresid.data.manifest import Counts, Split
from megaresid.data.shards import TOKEN
from megaresid.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "val")
SUFFIXES = (".bin",)
# Where its prepare.py for data sets with characters as tokens writes their vocabulary.
OWN_VOCABULARY = "meta.pkl"


def find(folder: Path) -> dict[Split, list[Path]]:
    """The one file of each split that is there.

    Raises UserError for a folder without any, and for a vocabulary other than GPT-2's.
    """
    if (folder / OWN_VOCABULARY).exists():
        raise UserError(
            f"{folder / OWN_VOCABULARY}: these ids have a vocabulary of their own (characters?), and only GPT-2's can "
            "be used; tokenize the text with GPT-2's"
        )
    found = {split: [folder / f"{split}.bin"] for split in SPLITS if (folder / f"{split}.bin").is_file()}
    if not found:
        raise UserError(f"{folder}: no train.bin or val.bin in it; name a folder with nanoGPT's data")
    return found


def check(path: Path) -> int:
    """The bytes that ``read`` will read. Raises UserError for a file that is not of this format."""
    return check_raw_ids(path, TOKEN)


def read(path: Path, advance: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The ids of a checked file as uint16[n] blocks, the last document perhaps without <|endoftext|>.

    ``advance`` is told the bytes of each block. Raises UserError for ids that are not GPT-2's.
    """
    return read_raw_ids(path, TOKEN, advance)


def write(folder: Path, split: Split, blocks: Iterable[np.ndarray], end_of_text: int) -> Counts:
    """Write the split's file from uint16[n] blocks with ``end_of_text`` after each document."""
    documents = tokens = 0
    with appearing(folder / f"{split}.bin") as file:
        for block in blocks:
            file.write(block)
            documents += np.count_nonzero(block == end_of_text)
            tokens += len(block)
    return Counts(documents=documents, tokens=tokens)
