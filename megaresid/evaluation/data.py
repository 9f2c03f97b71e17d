"""The files of ``--eval-data``: where they are, what they hold, and what is wrong with them.

Each is a plain file or gzip's (``.gz``), in UTF-8. Those that end in ``.jsonl`` hold one JSON object a line.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megaresid.errors import UserError

Row = dict[str, Any]


class Kind(NamedTuple):
    """What a field must be: in words, and as a test of its value and its row, whose earlier fields are right."""

    words: str
    fits: Callable[[Any, Row], bool]


Fields = Mapping[str, Kind]


def _is_text(value: Any, row: Row) -> bool:
    """Half of a surrogate pair, which JSON can spell, is no text."""
    try:
        return isinstance(value, str) and value.strip() != "" and value.encode() != b""
    except UnicodeEncodeError:
        return False


def _has_words_before_its_last(value: Any, row: Row) -> bool:
    """The last begins at the last space."""
    return _is_text(value, row) and value.rpartition(" ")[0].strip() != ""


def _are_texts(value: Any, row: Row) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(_is_text(text, row) for text in value)


def _are_labelled(value: Any, row: Row) -> bool:
    """A dict of two lists, one element a choice, whose labels differ."""
    if not isinstance(value, dict) or not all(_are_texts(value.get(key), row) for key in ("text", "label")):
        return False
    return len(value["text"]) == len(value["label"]) == len(set(value["label"]))


def _index_below(count: int, value: Any) -> bool:
    return type(value) is int and 0 <= value < count


TEXT = Kind("a text that is not empty", _is_text)

# Of each JSON lines file, the fields that are read; it may have others.
FIELDS: dict[str, Fields] = {
    "arc_easy_test.jsonl": {
        "question": TEXT,
        "choices": Kind('{"text": [...], "label": [...]}, two or more choices', _are_labelled),
        "answerKey": Kind("one of the labels", lambda value, row: value in row["choices"]["label"]),
    },
    "hellaswag_val_processed.jsonl": {
        "query": TEXT,
        "choices": Kind("a list of two or more texts", _are_texts),
        "gold": Kind("the index of a choice", lambda value, row: _index_below(len(row["choices"]), value)),
    },
    "lambada_test.jsonl": {"text": Kind("a text of two or more words", _has_words_before_its_last)},
    "piqa_valid.jsonl": {
        "goal": TEXT,
        "sol1": TEXT,
        "sol2": TEXT,
        "label": Kind("0 or 1", lambda value, row: _index_below(2, value)),
    },
    "wikitext2_raw_test_pages.jsonl": {"page": TEXT},
    "winogrande_xl_dev.jsonl": {
        "sentence": Kind("a text with one blank, _", lambda value, row: _is_text(value, row) and value.count("_") == 1),
        "option1": TEXT,
        "option2": TEXT,
        "answer": Kind('"1" or "2"', lambda value, row: value in ("1", "2")),
    },
}
WIKITEXT2 = "wikitext2_raw_test.txt"
FILES = (*sorted(FIELDS), WIKITEXT2)


def find(data: Path, name: str) -> Path:
    """The file ``name`` (one of ``FILES``) or ``name.gz`` in the folder ``data``. Raises UserError where it is not."""
    if not data.is_dir():
        raise UserError(f"--eval-data {data}: no such folder; name the one that holds {name}, plain or .gz")
    for path in (data / name, data / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"--eval-data {data}: there is no {name} or {name}.gz in it; it must hold {_contents(name)}")


def read_rows(path: Path, fields: Fields) -> list[Row]:
    """The rows of a JSON lines file, with at least these fields; lines of white space are passed over.

    Raises UserError naming the file, the line (from 1) and the field, where a row is not as ``fields`` says, where
    there is no row, and where the file cannot be read.
    """
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); get a good copy of the file") from None
        except RecursionError:
            raise UserError(f"{path}, line {number}: JSON nested too deep; get a good copy of the file") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; it must have {', '.join(fields)}")
        for field, kind in fields.items():
            if field not in row:
                raise UserError(f"{path}, line {number}: no field {field!r}; it must be {kind.words}")
            if not kind.fits(row[field], row):
                raise UserError(f"{path}, line {number}: {field!r} is {_short(row[field])}; it must be {kind.words}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: there is no row in it; get a good copy of the file")
    return rows


def read_text(path: Path) -> str:
    """A whole text file, its line ends as they are. Raises UserError where it cannot be read or is empty."""
    text = "".join(_lines(path))
    if not text.strip():
        raise UserError(f"{path}: there is no text in it; get a good copy of the file")
    return text


def _lines(path: Path) -> Iterator[str]:
    """Lines as ``\\n`` ends them, and only that."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number}: not UTF-8; get a good copy of the file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: a damaged gzip file ({error}); get a good copy of it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give --eval-data files that can be read") from None


def _contents(name: str) -> str:
    if name == WIKITEXT2:
        return "the raw test split of WikiText-2 as published (wiki.test.raw)"
    fields = "; ".join(f"{field}: {kind.words}" for field, kind in FIELDS[name].items())
    return f"one JSON object a line with {fields}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
