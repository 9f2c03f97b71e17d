"""Text to shards: units of the source are made into parts by workers, and assembled in their order meanwhile."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path

from data_prep.assemble import Assembler
from data_prep.content import cut_of, manifest_of, may_be_of
from data_prep.estimate import check_download, estimate, gigabytes, sample_of
from data_prep.job import Job
from data_prep.manifest import write_manifest
from data_prep.plan import PARTS, Plan, check_same, plan_of, write_share
from data_prep.pool import Pool
from data_prep.progress import Report, no_report
from data_prep.schedule import Schedule
from data_prep.sources import open_source
from data_prep.sources.source import UNIT_BYTES, Source
from data_prep.worker import Worker, WorkerOptions
from data_prep.workplace import (
    check_folder,
    found_records,
    held,
    remove_parts,
    remove_records,
    remove_shards,
    unfinished_plan,
)
from megaresid.data.manifest import MANIFEST_NAME, Manifest, load_manifest
from megaresid.errors import UserError

# Text takes more bytes than its compressed file, by less than this: with it a source has no more units than that.
MOST_COMPRESSION = 8
# From here on one worker is a process too: shards are then cut while it makes the next part.
WORTH_A_PROCESS = 4 * UNIT_BYTES


def prepare(job: Job, report: Report = no_report, say: Callable[[str], None] = lambda line: None) -> Manifest | None:
    """Do what ``job`` says, reporting how far it is and saying what it expects; the manifest, unless it is a share
    (whose parts then wait in ``out``) or a dry run.

    Raises UserError for a mistake in the options, having written nothing, and for whatever stops the job: what was
    finished then stays for --resume. Interrupted or killed, it leaves the same; a folder without a manifest is no data
    set.
    """
    job.check()
    try:
        check_folder(job.out, job.resume)
        source = open_source(job)
        plan = plan_of(job, source)
        if before := unfinished_plan(job.out):
            check_same(before, plan, job.out)
        if (job.out / MANIFEST_NAME).exists():
            # It was stopped at the very end, when parts or no more than their folder were left to remove.
            manifest = load_manifest(job.out)
            if not before and not may_be_of(plan, manifest):
                raise UserError(f"--out {job.out}: already holds a data set; name another folder, or delete this one")
            with held(job.out, plan, job.resume) as parts:
                remove_parts(parts)
            return manifest
        return _prepare(job, source, plan, report, say)
    except OSError as error:
        where, what = error.filename or job.out, error.strerror or error
        raise UserError(f"{where}: {what}; mend that and go on with --resume") from error


def _prepare(job: Job, source: Source, plan: Plan, report: Report, say: Callable[[str], None]) -> Manifest | None:
    options = WorkerOptions(
        reader=source.reader,
        parts=job.out / PARTS,
        plan=plan.sha256,
        vocab_file=job.vocab_file,
        backend=job.tokenizer_backend,
        skip_unreadable=job.skip_unreadable,
    )
    check_download(source, job)
    units = source.units(job.share)
    first = list(islice(units, 1 if job.dry_run else 2))
    units = chain(first, units)
    with ExitStack() as stack:
        # Workers start while the estimate is made, which takes about as long.
        processes = min(job.workers, 1 + source.bytes * MOST_COMPRESSION // UNIT_BYTES)
        alone = len(first) < 2 or (processes == 1 and source.bytes < WORTH_A_PROCESS)
        pool = None if alone else stack.enter_context(Pool(processes, options))
        worker = Worker(options)
        found = found_records(job.out, plan)
        sample = sample_of(job, source, worker.backend)
        largest = max((unit.bytes for unit in first), default=0)
        expected = estimate(job, source, sample, found.values(), 1 if alone else processes, largest)
        expected.check_disk(job.out)
        if job.dry_run:
            say(_planned(plan, source))
        say(str(expected))
        if job.dry_run:
            return None
        parts = stack.enter_context(held(job.out, plan, job.resume))
        remove_shards(job.out)
        # Where the limit ends the data set is known only when the shares are merged.
        limit = None if job.partition else job.limit_tokens
        schedule = Schedule(units, found, pool or worker, source.bytes / job.share.of, limit, report)
        if job.partition:
            with closing(schedule.records()) as records:
                names = [record.name for record in records]
            source.check_unchanged()
            write_share(parts, plan, names)
            return None
        try:
            manifest = _assemble(job, source, plan, parts, schedule)
        except BaseException:
            # An interruption may come when the data set is complete.
            if not (job.out / MANIFEST_NAME).exists():
                remove_shards(job.out)
            raise
        remove_parts(parts)
    report(1.0, *_totals(manifest))
    return manifest


def _assemble(job: Job, source: Source, plan: Plan, parts: Path, schedule: Schedule) -> Manifest:
    with Assembler(job.out, parts, cut_of(plan)) as assembler, closing(schedule.records()) as records:
        for record in records:
            if not assembler.add(record, parts):
                break
            schedule.assembled_tokens = assembler.tokens
        source.check_unchanged()
        assembled = assembler.finish()
    try:
        manifest = manifest_of(plan, assembled, workers=job.workers)
    except UserError:
        # No other cut may be made of these parts, so they would only be in the way.
        remove_records(parts)
        raise
    write_manifest(job.out, manifest)
    return manifest


def _planned(plan: Plan, source: Source) -> str:
    share = f", share {plan.share.number}/{plan.share.of}" if plan.share.of > 1 else ""
    first = f", the first is {plan.files[0].name}" if plan.files else ""
    files = f"{len(plan.files):,} files of {gigabytes(source.bytes)}"
    return f"plan {plan.sha256[:16]}: {source.kind}, {files}{first}{share}"


def _totals(manifest: Manifest) -> tuple[int, int]:
    """Documents and tokens of all splits."""
    counts = manifest.content.splits.values()
    return sum(count.documents for count in counts), sum(count.tokens for count in counts)
