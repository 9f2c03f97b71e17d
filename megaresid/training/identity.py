"""What a resumed run must share with the run that it goes on with, and what it means to allow another.

A checkpoint holds these values, and as ``history`` every change of them that was allowed on the way to it.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megaresid.errors import UserError

if TYPE_CHECKING:
    from megaresid.config import RunConfig

MEANING = {
    "data": "from step {step} on the samples are those of the new data, which begin in the middle of its order",
    "tokenizer": "the saved embeddings were learned for the tokens of the other one",
    "spec": "the saved parameters, of the same names and shapes, go through another computation",
    "global_batch_size": "the first sample of a step is step x global batch: {step} x {was} samples were seen, and "
    "{step} x {now} is the next",
    "seed": "the order of the data is another from here on, and sequences of this epoch may come twice or not at all; "
    "dropout goes on as it was saved",
    "optimizer": "the saved state of the one is taken for the other's",
}
"""The keys of an identity, each with what a resume with another value of it does."""

ADAM_FAMILY = ("adam", "adamw")
"""Optimizer types with the same state: of any two others, one cannot go on with what the other saved."""

HISTORY = "history"

Values = dict[str, str | int]


class Change(BaseModel):
    """Another value of a key from a step on, as a checkpoint's history holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    key: Literal["data", "tokenizer", "spec", "global_batch_size", "seed", "optimizer"]
    was: str | int | None
    now: str | int


_CHANGES = TypeAdapter(list[Change])


def parse_allowed(text: str) -> tuple[str, ...]:
    """The keys of ``--allow-other``; raises UserError for one that is none."""
    keys = tuple(key.strip() for key in text.split(",")) if text.strip() else ()
    for key in keys:
        if key not in MEANING:
            raise UserError(f"--allow-other {text}: {key!r} is no key: give some of {', '.join(MEANING)}, with commas")
    return keys


def check_resumed(
    path: Path,
    *,
    saved: Mapping[str, Any],
    mine: Values,
    step: int,
    config: "RunConfig",
    misfit: str | None,
) -> list[Change]:
    """The history of changes of a run that goes on from the checkpoint at ``path``, the allowed ones of now included.

    Args:
        saved: The checkpoint's identity.
        mine: This run's.
        step: The checkpoint's.
        misfit: What is wrong with the checkpoint's parameters for this run's model, None where they fit.

    Raises:
        UserError: Values differ that ``--allow-other`` does not name, or that nothing can allow. It tells all that
            differ, with both values.
    """
    differing = [key for key in mine if _differs(key, saved, mine)]
    told = "; ".join(_difference(key, saved, mine, path, config) for key in differing)
    problem = _impossible(differing, saved, mine, misfit)
    if problem:
        raise UserError(
            f"--resume {path}: {told}: no option allows it, for {problem}: resume with what it was started with"
        )
    if refused := [key for key in differing if key not in parse_allowed(config.run.allow_other)]:
        raise UserError(
            f"--resume {path}: {told}: resume with what it was started with, start anew from its weights by "
            f"--init-from, or go on with another {_listed(refused)} by --allow-other {','.join(differing)}"
        )
    try:
        history = _CHANGES.validate_python(saved.get(HISTORY, []))
        now = [Change(step=step, key=key, was=saved.get(key), now=mine[key]) for key in differing]
    except ValidationError:
        raise UserError(f"--resume {path}: its identity is damaged: use another checkpoint") from None
    return [*history, *now]


def describe(change: Change) -> str:
    """A line on a change that was allowed."""
    means = MEANING[change.key].format(step=change.step, was=change.was, now=change.now)
    return (
        f"another {change.key}, allowed: {_short(change.was)} until step {change.step}, {_short(change.now)} from "
        f"there: {means}"
    )


def _differs(key: str, saved: Mapping[str, Any], mine: Values) -> bool:
    if key == "tokenizer" and key not in saved:
        return False  # of an earlier version, whose data tells it too
    return saved.get(key) != mine[key]


def _difference(key: str, saved: Mapping[str, Any], mine: Values, path: Path, config: "RunConfig") -> str:
    told = f"its {key} is {_short(saved.get(key))}, this run's is {_short(mine[key])}"
    options = _model_options(path, config) if key == "spec" else ""
    return f"{told} ({options})" if options else told


def _impossible(differing: Collection[str], saved: Mapping[str, Any], mine: Values, misfit: str | None) -> str | None:
    """Why no option can allow it."""
    if "spec" in differing and misfit:
        return f"the parameters are others ({misfit})"
    if "optimizer" in differing:
        types = {str(values.get("optimizer")).lower() for values in (saved, mine)}
        if len(types) > 1 and not types <= set(ADAM_FAMILY):
            return "one optimizer cannot go on with the other's state (--init-from takes the weights alone)"
    return None


def _model_options(path: Path, config: "RunConfig") -> str:
    """The options of the model that differ, where the checkpoint still lies in its run directory."""
    try:
        saved = json.loads((path.resolve().parents[1] / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError, IndexError):
        return ""
    if not isinstance(saved, dict):
        return ""
    mine = config.flat()
    differing = [key for key in type(config.model).model_fields if key in saved and saved[key] != mine[key]]
    options = (f"--{key.replace('_', '-')} {saved[key]!r} there, {mine[key]!r} here" for key in differing)
    return ", ".join(options)


def _short(value: Any) -> str:
    """On one line, a hash by its first digits."""
    text = " ".join(str(value).split())
    return text[:12] if len(text) == 64 else text[:80]


def _listed(keys: Collection[str]) -> str:
    return " and ".join(keys)
