"""The plan of a job, kept beside its parts: what an interrupted job, and the machines that share one, must agree on."""

import hashlib
import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from data_prep.job import Job
from data_prep.sources.source import MOST_BYTES, UNIT_BYTES, Source
from data_prep.tokenizer import RANKS_SHA256
from megaresid.data.manifest import Record
from megaresid.durable import write_text
from megaresid.errors import UserError

# Raised when the same source and options would give other parts.
FORMAT = 1
PARTS, PLAN, SHARE = "parts", "plan.json", "share.json"
# Stands in a planned source for the sha256 over the documents' digests, which is known at the end.
DOCUMENTS_SHA256 = "DOCUMENTS-SHA256"

R = TypeVar("R", bound=Record)


class PlannedFile(Record):
    """A file as it was listed; ``stamp`` changes when the file does."""

    name: str
    bytes: int
    stamp: str


class Reading(Record):
    """The options that decide which documents there are."""

    source: str
    text_column: str
    language: str | None = None
    minimum_language_score: float | None = None
    minimum_score: float | None = None


class Cutting(Record):
    """The options that decide what the shards take of the documents."""

    shard_tokens: int
    validation_fraction: float
    deduplicate: bool
    limit_tokens: int | None = None


class PlannedShare(Record):
    number: int
    of: int


class Plan(Record):
    """Everything that decides the bytes of a job's parts, and then of its shards.

    ``source`` is the manifest's, as far as it is known before the documents are.
    """

    format: int
    unit_bytes: int
    most_bytes: int
    tokenizer_sha256: str
    source: dict[str, str]
    inputs: tuple[str, ...]
    reading: Reading
    cutting: Cutting
    share: PlannedShare
    files: tuple[PlannedFile, ...]

    @property
    def sha256(self) -> str:
        """Of what decides the parts: not the share and the cut, so that the shares of one job have the same, and not
        the stamps, as the time of a file differs between machines."""
        deciding = self.model_dump(mode="json", exclude={"share", "cutting", "files", "inputs"})
        deciding["files"] = [[file.name, file.bytes] for file in self.files]
        canonical = json.dumps(deciding, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    def described_source(self, documents_sha256: str) -> dict[str, str]:
        """The manifest's source, with the sha256 over the digests of the documents, 64 hexadecimal digits."""
        return {key: value.replace(DOCUMENTS_SHA256, documents_sha256) for key, value in self.source.items()}


class FinishedShare(Record):
    """share.json: the parts of a share in their order. It is written when all are complete."""

    number: int
    of: int
    plan: str
    parts: tuple[str, ...]
    complete: Literal[True] = True


def plan_of(job: Job, source: Source) -> Plan:
    described = source.describe(DOCUMENTS_SHA256)
    return Plan(
        format=FORMAT,
        unit_bytes=UNIT_BYTES,
        most_bytes=MOST_BYTES,
        tokenizer_sha256=RANKS_SHA256,
        source={key: value for key, value in described.items() if value is not None},
        inputs=tuple(map(_printable, job.input)),
        reading=Reading(**{name: getattr(job, name) for name in Reading.model_fields}),
        cutting=Cutting(**{name: getattr(job, name) for name in Cutting.model_fields}),
        share=PlannedShare(number=job.share.number, of=job.share.of),
        files=tuple(
            PlannedFile(name=_printable(file.name), bytes=file.bytes, stamp=file.stamp) for file in source.files
        ),
    )


def load_plan(parts: Path) -> Plan:
    """The plan in a folder of parts. Raises UserError where there is none, or one of another version."""
    return _load(Plan, parts / PLAN)


def load_share(parts: Path) -> FinishedShare:
    """What a finished share says of itself. Raises UserError where it is missing: the share is not finished."""
    return _load(FinishedShare, parts / SHARE)


def write_plan(parts: Path, plan: Plan) -> None:
    _write(parts / PLAN, plan)


def write_share(parts: Path, plan: Plan, names: list[str]) -> None:
    share = FinishedShare(number=plan.share.number, of=plan.share.of, plan=plan.sha256, parts=tuple(names))
    _write(parts / SHARE, share)


def check_same(before: Plan, now: Plan, out: Path) -> None:
    """Raise UserError naming the first thing in which the job differs from the unfinished one in ``out``."""
    anew = f"or delete {out} and start anew"
    for section in ("reading", "cutting"):
        for name, value in getattr(now, section):
            if value != (old := getattr(getattr(before, section), name)):
                option = f"--{name.replace('_', '-')}"
                old = "none" if old is None else old
                raise UserError(f"{option} {value}: the unfinished job in {out} had {old}; say the same, {anew}")
    if before.share != now.share:
        shares = [f"{plan.share.number}/{plan.share.of}" for plan in (now, before)]
        raise UserError(f"--partition {shares[0]}: the unfinished job in {out} had {shares[1]}; say the same, {anew}")
    for key in sorted(before.source.keys() | now.source.keys()):
        if before.source.get(key) != now.source.get(key):
            raise UserError(
                f"--resume: the source's {key} is {now.source.get(key)}, and was {before.source.get(key)} when the job "
                f"in {out} began; name that one, {anew}"
            )
    _check_same_files(before.files, now.files, anew)
    if before.sha256 != now.sha256:
        raise UserError(f"--resume: another version of data_prep began the job in {out}; use that one, {anew}")


def _check_same_files(before: tuple[PlannedFile, ...], now: tuple[PlannedFile, ...], anew: str) -> None:
    if before == now:
        return
    old, new = ({file.name: file for file in files} for files in (before, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) == new.get(name):
            continue
        if name not in new:
            change = "was read by the unfinished job and is missing now"
        elif name not in old:
            change = "was not there when the unfinished job began"
        elif old[name].bytes != new[name].bytes:
            change = f"has {new[name].bytes} bytes, and had {old[name].bytes} when the unfinished job began"
        else:
            change = "was written again after the unfinished job began"
        raise UserError(f"--resume: {name} {change}; put it back as it was, {anew}")
    raise UserError(f"--resume: the files come in another order than when the unfinished job began, {anew}")


def _printable(name: str) -> str:
    """A name with the bytes that are not UTF-8 spelled out: JSON cannot hold them."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _load(kind: type[R], path: Path) -> R:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is that share of the job finished?") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "content"
        raise UserError(f"{path}: {where}: {problem['msg']}; delete its folder and start the job anew") from None


def _write(path: Path, record: Record) -> None:
    write_text(path, json.dumps(record.model_dump(mode="json"), indent=1) + "\n")
