"""The manifest of a data set, from the plan of the job and what was assembled of its parts."""

import hashlib
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

import megaresid
from data_prep import tokenizer
from data_prep.assemble import Assembled, Cut
from data_prep.plan import Plan
from megaresid.data.manifest import Content, Dropped, Manifest, Options, Provenance, Source, SourceFiles
from megaresid.errors import UserError

LIBRARIES = ("tiktoken", "gigatoken", "numpy", "pyarrow")


def cut_of(plan: Plan) -> Cut:
    return Cut(**plan.cutting.model_dump())


def manifest_of(
    plan: Plan, assembled: Assembled, workers: int | None = None, partitions: int | None = None
) -> Manifest:
    """``workers`` and ``partitions`` say how many processes, and machines, there were.

    Raises UserError when a split has no document.
    """
    _check_splits(plan, assembled)
    provenance = _provenance(plan, assembled, workers, partitions)
    return Manifest(schema=1, content=content_of(plan, assembled), provenance=provenance)


def options_of(plan: Plan) -> Options:
    reading, cutting = plan.reading, plan.cutting
    return Options(
        shard_tokens=cutting.shard_tokens,
        validation_fraction=cutting.validation_fraction,
        language=reading.language,
        minimum_language_score=reading.minimum_language_score,
        minimum_score=reading.minimum_score,
        deduplicate=cutting.deduplicate or None,
        limit_tokens=cutting.limit_tokens,
    )


def may_be_of(plan: Plan, manifest: Manifest) -> bool:
    """Whether a data set has the options and, as far as it is known beforehand, the source of this plan."""
    source = manifest.content.source
    expected = Source(**plan.described_source(source.revision.removeprefix("sha256:")))
    return source == expected and manifest.content.options == options_of(plan)


def content_of(plan: Plan, assembled: Assembled) -> Content:
    return Content(
        source=plan.described_source(assembled.documents_sha256),
        options=options_of(plan),
        tokenizer={
            "name": tokenizer.NAME,
            "sha256": plan.tokenizer_sha256,
            "vocab_size": tokenizer.VOCAB_SIZE,
            "end_of_text": tokenizer.END_OF_TEXT,
        },
        split_rule=cut_of(plan).split_rule,
        splits=assembled.splits,
        dropped=Dropped.of(assembled.dropped),
        runs_cut=assembled.runs_cut,
        limited=assembled.limited or None,
        shards=assembled.shards,
    )


def _check_splits(plan: Plan, assembled: Assembled) -> None:
    total = sum(counts.documents for counts in assembled.splits.values())
    if not total:
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(assembled.dropped.items()) if count)
        where = f"--input {' '.join(plan.inputs)}" if plan.inputs else f"--source {plan.reading.source}"
        if assembled.limited:
            limit = plan.cutting.limit_tokens
            raise UserError(f"--limit-tokens {limit}: the first document of {where} has more; use a higher limit")
        raise UserError(f"{where}: no document to keep in it (left out: {left_out or 'none'}); check files and options")
    for split, counts in assembled.splits.items():
        if not counts.documents:
            raise UserError(
                f"--validation-fraction {plan.cutting.validation_fraction}: leaves no document of {total} for the "
                f"{split} split; use {'a larger' if split == 'val' else 'a smaller'} fraction or more documents"
            )


def _provenance(plan: Plan, assembled: Assembled, workers: int | None, partitions: int | None) -> Provenance:
    lines = (f"{file.name} {file.bytes} {file.stamp}\n" for file in plan.files)
    return Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        inputs=plan.inputs,
        text_column=plan.reading.text_column,
        source_files=SourceFiles(
            count=len(plan.files),
            bytes=sum(file.bytes for file in plan.files),
            sha256=hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest(),
        ),
        workers=workers,
        partitions=partitions,
        tokenizer_backend="+".join(assembled.backends) or None,
        proven_bytes=assembled.proven_bytes,
        versions={"megaresid": megaresid.__version__, "python": python_version()} | _installed(),
    )


def _installed() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:  # gigatoken is optional
            pass
    return found
