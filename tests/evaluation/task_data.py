"""Small ``--eval-data`` folders: the first rows of the published files where they are at hand, else made ones."""

import gzip
import json
import random
from itertools import islice
from pathlib import Path

from eval_data import REAL

PAGE = "wikitext2_raw_test_pages.jsonl"
WORDS = (
    "the a water plant light energy of and from cells moves slowly over warm rock while green leaves absorb most "
    "sunlight during summer because heat rises through air above city streets , then falls again in winter ."
).split()


def task_folder(folder: Path, items: int) -> Path:
    """A folder with ``items`` rows of every task and two pages of WikiText-2, cut short; published ones if possible."""
    for name, made in made_rows(items).items():
        rows = published_rows(name, items) if REAL.is_dir() else made
        if name == PAGE:
            rows = [{"page": row["page"][:2000]} for row in rows[:2]]
        write_rows(folder / name, rows)
    return folder


def published_rows(name: str, items: int) -> list[dict]:
    with gzip.open(REAL / f"{name}.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, items)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def made_rows(items: int) -> dict[str, list[dict]]:
    """By file; texts of random words, with choices of different lengths."""
    random_ = random.Random(0)

    def text(least: int = 3, most: int = 9) -> str:
        return " ".join(random_.choices(WORDS, k=random_.randint(least, most)))

    def arc() -> dict:
        choices = [text(1, 6) for _ in range(random_.randint(3, 5))]
        labels = "ABCDE"[: len(choices)]
        return {
            "question": text() + " ?",
            "choices": {"text": choices, "label": list(labels)},
            "answerKey": random_.choice(labels),
        }

    def hellaswag() -> dict:
        return {"query": f"Making : {text()}", "choices": [text() for _ in range(4)], "gold": random_.randrange(4)}

    def piqa() -> dict:
        return {"goal": text(), "sol1": text(), "sol2": text(), "label": random_.randrange(2)}

    def winogrande() -> dict:
        return {
            "sentence": f"{text()} _ {text()}",
            "option1": text(1, 2),
            "option2": text(1, 2),
            "answer": random_.choice("12"),
        }

    return {
        "arc_easy_test.jsonl": [arc() for _ in range(items)],
        "hellaswag_val_processed.jsonl": [hellaswag() for _ in range(items)],
        "piqa_valid.jsonl": [piqa() for _ in range(items)],
        "winogrande_xl_dev.jsonl": [winogrande() for _ in range(items)],
        "lambada_test.jsonl": [{"text": f"{text(9, 40)} end"} for _ in range(items)],
        PAGE: [{"page": f" = {text(1, 3)} = \n \n {text(200, 300)} \n"} for _ in range(2)],
    }
