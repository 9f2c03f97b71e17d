"""Evaluation data for tests: the published files where they are at hand, small made ones of their form everywhere."""

import gzip
import json
import os
from pathlib import Path

import pytest
import tiktoken

_NAMED = os.environ.get("MEGARESID_EVAL_DATA")
REAL = Path(_NAMED) if _NAMED else Path(__file__).parents[3] / "shared" / "data" / "eval"
"""Named by MEGARESID_EVAL_DATA, else beside the checkout."""

needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="needs the published data sets: MEGARESID_EVAL_DATA")

BYTES = tiktoken.Encoding(
    "bytes",
    pat_str=r"[\s\S]",
    mergeable_ranks={bytes([byte]): byte for byte in range(256)},
    special_tokens={"<|endoftext|>": 256},
)
"""A token for each byte: small models with a whole vocabulary."""

WIKI = (
    " \n = First Page = \n \n It was a first @-@ rate page , with 1 @,@ 000 words ; or so . \n"
    " Its author said : \" N is ' one ' ( or [ two ] ) ! \" \n \n = = Notes = = \n \n = = = Deeper = = = \n \n"
    " 20 ° in the shade 's shade ? \n \n \n = Second = \n \n Short . \n \n = Third Page = \n \n"
    " A 3 @.@ 5 % share of the players ' gains . Café – naïve . \n "
)

PASSAGES = [
    'He said: "I never thought\n\nof that." And she said so',
    "The dog saw the cat, and the cat saw the dog",
    "A b",
    " Two  blanks  before  words",
    "An ending with a blank ",
    "Some white space\n before",
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One row a line, compressed where the name ends in .gz."""
    data = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def small_data(folder: Path) -> Path:
    """A folder for ``--eval-data`` with small files of WikiText-2 and LAMBADA."""
    (folder / "wikitext2_raw_test.txt").write_text(WIKI, encoding="utf-8", newline="")
    write_jsonl(folder / "lambada_test.jsonl.gz", [{"text": text} for text in PASSAGES])
    return folder
