"""Tasks of lm-evaluation-harness whose documents are read from ``--eval-data`` instead of from the Hub.

A task is the configuration that lm-evaluation-harness ships, so that prompts, metrics and version are its own, with our
rows as its data set. HellaSwag's rows are texts that were prepared already; the others are as published.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaresid.errors import UserError
from megaresid.evaluation.data import FIELDS, Row, find, read_rows

SPLITS = ("test_split", "validation_split", "training_split")


def _as_read(row: Row) -> Row:
    return row


def _arc_document(row: Row) -> Row:
    return row | {"choices": {key: row["choices"][key] for key in ("text", "label")}}


def _hellaswag_document(row: Row) -> Row:
    return {"query": row["query"], "choices": row["choices"], "label": str(row["gold"])}


@dataclass(frozen=True)
class Source:
    """Where a task comes from: its configuration in lm-evaluation-harness's folder of tasks, the file of its rows, and
    the document that the configuration expects of a row."""

    configuration: str
    file: str
    document: Callable[[Row], Row] = _as_read
    dropped: tuple[str, ...] = ()
    """Keys of the configuration that do not hold for these rows."""


OFFLINE = {
    "arc_easy": Source("arc/arc_easy.yaml", "arc_easy_test.jsonl", _arc_document),
    "hellaswag": Source(
        "hellaswag/hellaswag.yaml", "hellaswag_val_processed.jsonl", _hellaswag_document, dropped=("process_docs",)
    ),
    "piqa": Source("piqa/piqa.yaml", "piqa_valid.jsonl"),
    "winogrande": Source("winogrande/default.yaml", "winogrande_xl_dev.jsonl"),
    "lambada_openai": Source("lambada/lambada_openai.yaml", "lambada_test.jsonl"),
    "wikitext": Source("wikitext/wikitext.yaml", "wikitext2_raw_test_pages.jsonl"),
}


def load(names: Sequence[str], data: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """The tasks as ``lm_eval.evaluator.evaluate`` takes them, and the file that each was read from.

    Raises UserError for a task that is not in ``OFFLINE``, and for a file that is missing or damaged.
    """
    files = {}
    for name in names:
        if name not in OFFLINE:
            raise UserError(
                f"task {name!r}: --eval-data has files for {', '.join(OFFLINE)} alone; others come from the Hugging "
                "Face Hub, without --eval-data"
            )
        files[name] = find(data, OFFLINE[name].file)
    return {"tasks": {name: _task(OFFLINE[name], files[name]) for name in names}, "groups": {}}, files


def _task(source: Source, path: Path) -> Any:
    """A task whose documents are in memory: nothing is written to the cache of ``datasets``."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    fields = FIELDS[source.file]
    rows = ({field: row[field] for field in fields} for row in read_rows(path, fields))
    documents = Dataset.from_list([source.document(row) for row in rows])
    configuration = load_yaml(Path(lm_eval.tasks.__file__).parent / source.configuration)
    evaluated = next(configuration[key] for key in SPLITS if configuration.get(key))
    unused = [key for key in SPLITS if configuration.get(key) != evaluated]
    for key in (*unused, *source.dropped):
        configuration.pop(key, None)
    return ConfigurableTask(config={**configuration, "custom_dataset": lambda **_: {evaluated: documents}})
