"""What ``--eval`` chooses: its grammar, and the measures and hooks that it stands for.

    validation@500 wikitext2,lambada@1000 arc_easy,hellaswag@end my_hooks:gate_norms@100

Entries are separated by blanks; each is names, separated by commas, and when to measure them: every so many steps (and
at both ends of the run), or at its end alone. A name is ``validation``, ``wikitext2``, ``lambada``, a user's
``module:function`` (``function(engine) -> dict[str, float]``), or else a task of lm-evaluation-harness.
"""

import functools
import importlib
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from megaresid.errors import UserError

if TYPE_CHECKING:
    from megaresid.data.manifest import Tokenizer
    from megaresid.evaluation.hook import Hook, Measure

VALIDATION = "validation"
PERPLEXITIES = ("wikitext2", "lambada")
END = "end"
MEND = 'write names@steps or names@end, such as "validation@1000 arc_easy,piqa@end"'


@dataclass(frozen=True)
class Entry:
    """Names that are measured together: every ``interval`` steps, or for None at the end alone."""

    names: tuple[str, ...]
    interval: int | None


def parse(text: str) -> list[Entry]:
    """The entries of ``--eval``; none for an empty text. Raises UserError."""
    entries = []
    for word in text.split():
        names, at, when = word.rpartition("@")
        if not at:
            raise UserError(f"--eval {word}: it does not say when: {MEND} (no blanks within an entry)")
        if not (when == END or re.fullmatch("0*[1-9][0-9]{0,15}", when)):
            raise UserError(f"--eval {word}: {when!r} is not a number of steps from 1, nor {END!r}: {MEND}")
        entries.append(Entry(tuple(names.split(",")), None if when == END else int(when)))
    check_names([name for entry in entries for name in entry.names], "--eval")
    return entries


def check_names(names: Sequence[str], option: str) -> None:
    """Raises UserError for a name that cannot be one and for one that is given twice."""
    for name in names:
        if not re.fullmatch(r"[\w.]+:\w+|[^\s,:@=]+", name):
            raise UserError(
                f"{option}: {name!r} is no name: give {VALIDATION}, {', '.join(PERPLEXITIES)}, module:function or a "
                "task of lm-evaluation-harness, with commas between names"
            )
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{option}: {name} is named {times} times: name it once")


def hooks(entries: Iterable[Entry], data: Path | None, validation: "Callable[[], Measure]") -> "tuple[Hook, ...]":
    """The hooks of the entries, validation first; raises UserError as ``measures`` does."""
    from megaresid.evaluation.hook import Hook

    found = [
        Hook(name, entry.interval, measure)
        for entry in entries
        for name, measure in measures(entry.names, data, validation).items()
    ]
    return tuple(sorted(found, key=lambda hook: hook.name != VALIDATION))


def measures(
    names: Sequence[str],
    data: Path | None,
    validation: "Callable[[], Measure]",
    limit: int | None = None,
    option: str = "--eval",
) -> "dict[str, Measure]":
    """The measure of each name, all tasks of lm-evaluation-harness being one, whose name is theirs with commas.

    Reads and checks their texts, those from the Hub by one rank of the machine before the others.

    Args:
        names: As in an entry.
        data: ``--eval-data``, or None for the Hub.
        validation: Makes the measure of that name.
        limit: Items of each task; None for all.
        option: The option that holds the names, for errors.

    Raises:
        UserError: an unknown name, a text that is missing or damaged, a user's function that cannot be one.
    """
    from megaresid.evaluation.first_alone import first_alone

    if data is not None and not data.is_dir():
        raise UserError(f"--eval-data {data}: no such folder: name one with the files of the tasks")
    makers: dict[str, Callable[[], Measure]] = {}
    tasks = [name for name in names if _is_task(name)]
    for name in names:
        if name == VALIDATION:
            makers[name] = validation
        elif ":" in name:
            makers[name] = functools.partial(_users_own, name, option)
        elif name in PERPLEXITIES:
            makers[name] = functools.partial(_perplexity, name, data)
    if tasks:
        makers[",".join(tasks)] = functools.partial(_tasks, tasks, data, limit)
    with first_alone(data is None and any(map(reads_text, names))):
        return {name: make() for name, make in makers.items()}


def reads_text(name: str) -> bool:
    """Whether it is a text that GPT-2's tokenizer cuts up, rather than tokens of the run's own data."""
    return name in PERPLEXITIES or _is_task(name)


def check_tokenizer(names: Iterable[str], tokenizer: "Tokenizer", folder: Path) -> None:
    """Raises UserError where a text would reach a model as other ids than those that it is trained on."""
    from data_prep.tokenizer import RANKS_SHA256

    if tokenizer.sha256 != RANKS_SHA256 and (texts := [name for name in names if reads_text(name)]):
        raise UserError(
            f"--eval {texts[0]}: its text is cut up by GPT-2's tokenizer, and data folder {folder} by another "
            f"({tokenizer.name}): leave it out, or tokenize the data by GPT-2's"
        )


def _is_task(name: str) -> bool:
    return name != VALIDATION and name not in PERPLEXITIES and ":" not in name


def _perplexity(name: str, data: Path | None) -> "Measure":
    from megaresid.evaluation import perplexity

    return getattr(perplexity, name)(data, _encoding())


def _tasks(names: Sequence[str], data: Path | None, limit: int | None) -> "Measure":
    from megaresid.evaluation.tasks import tasks

    try:
        return tasks(names, data, _encoding(), limit)
    except UserError as error:
        for name in names:
            for meant in get_close_matches(name, (VALIDATION, *PERPLEXITIES), n=1, cutoff=0.8):
                raise UserError(f"{error} (or is {meant!r} meant by {name!r}?)") from error
        raise


@functools.cache
def _encoding():
    from data_prep.tokenizer import gpt2_encoding

    return gpt2_encoding()


def _users_own(path: str, option: str) -> "Measure":
    module, name = path.split(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{option} {path}: cannot import it: {error}; is its folder on PYTHONPATH?") from error
    except (Exception, SystemExit) as error:  # the user's file, as it is executed
        raise UserError(f"{option} {path}: cannot import it: {type(error).__name__}: {error}") from error
    try:
        inspect.signature(function).bind("engine")
    except (TypeError, ValueError) as error:
        raise UserError(f"{option} {path}: not a function of the engine alone: {error}") from error
    return function
