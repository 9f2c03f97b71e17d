"""The texts of perplexity, WikiText-2 and LAMBADA, in the forms in which they are measured."""

import re
from pathlib import Path

from megaresid.errors import UserError
from megaresid.evaluation.data import FIELDS, WIKITEXT2, find, read_rows, read_text
from megaresid.evaluation.hub_data import HubFile, download

LAMBADA = "lambada_test.jsonl"
WIKITEXT2_ON_HUB = HubFile(
    "Salesforce/wikitext",
    "b08601e04326c79dfdd32d625aee71d232d685c3",
    "wikitext-2-raw-v1/test-00000-of-00001.parquet",
    0.7,
)
LAMBADA_ON_HUB = HubFile(
    "EleutherAI/lambada_openai", "879e19a2c9bb7ef03f9cf962089cf7d008f91e27", "data/lambada_test.jsonl", 1.8
)


def wikitext2_rows(data: Path | None) -> list[str]:
    """The raw test split as the Hub's rows, one a line: blank lines are ``""``, others ``" text \\n"``.

    From ``data`` (the published ``wiki.test.raw``) or, where that is None, from the Hub; the same either way: 4,358
    rows. Raises UserError.
    """
    if data is None:
        return _text_column(download(WIKITEXT2_ON_HUB))
    path = find(data, WIKITEXT2)
    text = read_text(path)
    if "\r" in text:
        line = text[: text.index("\r")].count("\n") + 1
        raise UserError(f"{path}, line {line}: a carriage return; the file as published has none: get that one")
    # A last line without an end is a row too.
    lines = text.removesuffix("\n").split("\n")
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _text_column(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"{path}: not a table with texts ({type(error).__name__}); remove {WIKITEXT2_ON_HUB.dataset} from the Hub "
            "library's cache, or give a folder with the files by --eval-data"
        ) from None


def wikitext2_stream(rows: list[str]) -> str:
    """One text, as the Hugging Face guide to perplexity joins the rows: 287,644 tokens of GPT-2's."""
    return "\n\n".join(rows)


def wikitext2_pages(rows: list[str]) -> list[str]:
    """The articles, as lm-evaluation-harness's data set has them: the raw lines from one title, ``= Title =``, to the
    next; those of white space alone are left out. 62 pages, 241,335 words, 1,290,527 bytes.

    The blank lines of the file are ``" "`` again, and the line end before a title belongs to neither page.
    """
    lines = "".join(row or " \n" for row in rows).split("\n")
    titles = [number for number, line in enumerate(lines) if _is_title(line)]
    bounds = [0, *titles, len(lines)]
    pages = ("\n".join(lines[start:end]) for start, end in zip(bounds, bounds[1:]))
    return [page for page in pages if page.strip()]


def _is_title(line: str) -> bool:
    """One "=" on either side; the lesser headings have ``= =`` and more, which count as ``==``."""
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


# WikiText's spaces around numbers and marks are undone in this order.
_BEFORE_PAIRS = [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]
_BEFORE_PAIRS += [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
_PAIRS = ("()", "[]", "{}", '""', "''")
_AFTER_PAIRS = [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}")]
_AFTER_PAIRS += [(" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]


def detokenized(page: str) -> str:
    """A page of WikiText as lm-evaluation-harness's task ``wikitext`` has the model read it: marks, numbers, brackets
    and quotations without the spaces that WikiText put around them. The task's slips are kept: " N " becomes " 1 ",
    and a digit between slashes becomes its own pattern."""
    page = page.replace("s '", "s'")
    page = re.sub(r"/' [0-9]/", "/'[0-9]/", page)
    for spaced, joined in _BEFORE_PAIRS:
        page = page.replace(spaced, joined)
    for left, right in _PAIRS:
        inside = rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}"
        page = re.sub(inside, lambda found: left + found[1] + right, page)
    for spaced, joined in _AFTER_PAIRS:
        page = page.replace(spaced, joined)
    return page


def count_words(page: str) -> int:
    """As the task counts them: the pieces between runs of white space, empty ones at the ends too."""
    return len(re.split(r"\s+", page))


def lambada_passages(data: Path | None) -> list[str]:
    """OpenAI's 5,153 passages, from ``data`` or, where that is None, from the Hub. Raises UserError, for a passage of
    one word too: there would be nothing to predict it from."""
    path = download(LAMBADA_ON_HUB) if data is None else find(data, LAMBADA)
    return [row["text"] for row in read_rows(path, FIELDS[LAMBADA])]


def split_last_word(passage: str) -> tuple[str, str]:
    """What comes before the last space, and the rest with that space before it; ("", " word") where there is none."""
    before, _, last = passage.rpartition(" ")
    return before, f" {last}"
