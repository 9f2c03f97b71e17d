"""Joins the shares of a job, which several machines made, into the data set that one would have made."""

import shutil
from collections.abc import Iterator
from itertools import accumulate, zip_longest
from pathlib import Path

from data_prep.assemble import Assembler
from data_prep.content import cut_of, manifest_of
from data_prep.manifest import write_manifest
from data_prep.parts import PartRecord, read_record
from data_prep.plan import PARTS, Plan, load_plan, load_share
from data_prep.progress import Report, no_report
from data_prep.workplace import alone_in, check_folder, remove_shards
from megaresid.data.manifest import MANIFEST_NAME, Manifest
from megaresid.data.shards import TOKEN_BYTES
from megaresid.errors import UserError

# Of a seen document, twice, as runs on disk are copied when they are merged.
SEEN_BYTES = 2 * 16


def merge(folders: list[Path], out: Path, report: Report = no_report) -> Manifest:
    """Assemble the parts in ``folders``, each with one finished share of the same job, into ``out``.

    The shards and the manifest's content are the bytes that one machine makes of the whole; the folders are left as
    they are. Raises UserError, having written nothing, for a folder that is no finished share, for shares of different
    jobs, missing and repeated shares, and too little space; for a damaged part after deleting what was written.
    """
    shares = _in_order(folders)
    first = shares[0][1]
    records = [(record, folder) for folder, _ in shares for record in _records(folder)]
    _check_all_there(records, first)
    check_folder(out, resume=False)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with alone_in(out):
            # Another merge may have come to its end before the folder was free.
            check_folder(out, resume=False)
            try:
                _check_space(out, [record for record, _ in records], first)
                return _assemble(records, first, out, len(shares), report)
            except BaseException:
                if not (out / MANIFEST_NAME).exists():
                    _remove(out, made)
                raise
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; mend that and merge again") from error


def _remove(out: Path, made: list[Path]) -> None:
    """Remove what was written in ``out``, and the folders that were made for it, innermost first."""
    if out.is_dir():
        remove_shards(out)
        shutil.rmtree(out / PARTS, ignore_errors=True)
    for folder in made:
        if folder.is_dir():
            folder.rmdir()


def _assemble(records: list[tuple[PartRecord, Path]], plan: Plan, out: Path, shares: int, report: Report) -> Manifest:
    total = max(1, sum(record.bytes for record, _ in records))
    done = 0
    with Assembler(out, out / PARTS, cut_of(plan)) as assembler:
        for record, folder in records:
            if not assembler.add(record, folder / PARTS):
                break
            done += record.bytes
            report(done / total, assembler.documents, assembler.tokens)
        assembled = assembler.finish()
    manifest = manifest_of(plan, assembled, partitions=shares)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    write_manifest(out, manifest)
    report(1.0, assembler.documents, assembler.tokens)
    return manifest


def _in_order(folders: list[Path]) -> list[tuple[Path, Plan]]:
    """The folders with their plans, by the number of their share: shares 1 to n of one job, each once."""
    plans = [(folder, load_plan(folder / PARTS)) for folder in folders]
    if not plans:
        raise UserError("merge: no folder named; name the --out folders of all shares")
    first_folder, first = plans[0]
    found: dict[int, tuple[Path, Plan]] = {}
    for folder, plan in plans:
        _check_one_job(first_folder, first, folder, plan)
        number = plan.share.number
        if number in found:
            raise UserError(f"{folder}: share {number}/{plan.share.of}, as is {found[number][0]}; name each share once")
        found[number] = folder, plan
    missing = [f"{number}/{first.share.of}" for number in range(1, first.share.of + 1) if number not in found]
    if missing:
        raise UserError(f"share{'s' * (len(missing) > 1)} {', '.join(missing)} missing; name the folders of all shares")
    return [found[number] for number in sorted(found)]


def _check_one_job(first_folder: Path, first: Plan, folder: Path, plan: Plan) -> None:
    """Raise UserError naming the first thing in which two shares are not of one job."""
    mend = "merge the shares of one job only"
    for section in ("reading", "cutting"):
        for name, value in getattr(plan, section):
            if value != (other := getattr(getattr(first, section), name)):
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{folder}: made with {option} {value}, {first_folder} with {other}; {mend}")
    if plan.share.of != first.share.of:
        raise UserError(f"{folder}: one share of {plan.share.of}, {first_folder} one of {first.share.of}; {mend}")
    for key in sorted(plan.source.keys() | first.source.keys()):
        if plan.source.get(key) != first.source.get(key):
            pair = plan.source.get(key), first.source.get(key)
            raise UserError(f"{folder}: its source's {key} is {pair[0]}, that of {first_folder} is {pair[1]}; {mend}")
    for mine, other in zip_longest(plan.files, first.files):
        seen = [f"{file.name} ({file.bytes} bytes)" if file else "none" for file in (mine, other)]
        if seen[0] != seen[1]:
            raise UserError(f"{folder}: read {seen[0]} where {first_folder} read {seen[1]}; {mend}")
    if plan.sha256 != first.sha256:
        raise UserError(f"{folder}: made by another version of data_prep than {first_folder}; {mend}")


def _records(folder: Path) -> Iterator[PartRecord]:
    """The records of a share's parts, in order. Raises UserError where the share is not finished or a part is gone."""
    plan, share = load_plan(folder / PARTS), load_share(folder / PARTS)
    if (share.number, share.of, share.plan) != (plan.share.number, plan.share.of, plan.sha256):
        raise UserError(f"{folder}: its share.json is of another job than its plan.json; make the share again")
    for name in share.parts:
        record = read_record(folder / PARTS, name, plan.sha256)
        if record is None:
            raise UserError(f"{folder / PARTS}: part {name} is missing or damaged; finish the share with --resume")
        yield record


def _check_all_there(records: list[tuple[PartRecord, Path]], plan: Plan) -> None:
    """The parts must cover the source without a gap; each says where it stands in it."""
    ends = [0, *accumulate(record.bytes for record, _ in records)]
    for (record, folder), position in zip(records, ends, strict=False):
        if record.position != position:
            raise UserError(
                f"{folder}: part {record.name} begins at byte {record.position} of the source, the one "
                f"before it ends at {position}; make the shares again from the same files"
            )
    if (total := sum(file.bytes for file in plan.files)) != ends[-1]:
        raise UserError(
            f"{records[-1][1] if records else 'merge'}: the parts end at byte {ends[-1]} of the source, "
            f"which has {total}; make the shares again from the same files"
        )


def _check_space(out: Path, records: list[PartRecord], plan: Plan) -> None:
    cut = plan.cutting
    tokens = sum(record.tokens for record in records)
    needed = TOKEN_BYTES * min(tokens, cut.limit_tokens or tokens)
    if cut.deduplicate:
        needed += SEEN_BYTES * sum(record.documents for record in records)
    if needed > (free := shutil.disk_usage(out).free):
        raise UserError(f"--out {out}: needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room")
