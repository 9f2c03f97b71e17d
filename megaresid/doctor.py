"""Look an installation over: ``python -m megaresid.doctor --data data/python-docs --run-dir runs``"""

import functools
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaresid.checks.child import Child, ChildFailed
from megaresid.checks.finding import Check, Finding, fault, found_by
from megaresid.errors import exits_with_user_errors

Folder = Annotated[Path, tyro.conf.arg(metavar="DIR")]
COLOURS = {"ok": "green", "warning": "yellow", "fault": "bold red"}
CPU_RANKS = 2


def examine(
    data: tuple[Path, ...], run_dir: Path, deepspeed_config: Path | None, verify: bool, network: bool
) -> Iterator[Finding]:
    """The findings, as they are made. What is slow is started before what can be done meanwhile."""
    # After the options are parsed: --help must not wait for these.
    from megaresid.checks import data as data_checks
    from megaresid.checks import deepspeed_json, gpu, launcher, machine, operators, software, storage
    from megaresid.training.compiled_ops import environment_folder

    seen, driver = gpu.ask_torch(), gpu.ask_driver()
    on_gpu = bool(seen.get("devices"))
    ranks = len(seen["devices"]) if on_gpu else CPU_RANKS
    ring: Child | ChildFailed
    try:
        ring = launcher.start_ranks(ranks, on_gpu)
    except ChildFailed as error:
        ring = error
    folder = environment_folder()
    wanted, ranges = software.required()
    checks: list[tuple[str, Check]] = [
        ("Python", functools.partial(software.python, wanted)),
        ("packages", functools.partial(software.packages, ranges, on_gpu)),
        ("compiler", functools.partial(software.compiler, bool(operators.built(folder)) or on_gpu)),
        ("compiled operators", functools.partial(operators.operators, folder, on_gpu)),
        ("GPU", functools.partial(gpu.gpus, seen, driver)),
        ("cores", functools.partial(machine.cores, ranks, machine.cores_available())),
        ("shared memory", machine.shared_memory),
        ("open files", machine.open_files),
        ("vocabulary", functools.partial(data_checks.vocabulary, network)),
        *((f"data {path}", functools.partial(data_checks.data_folder, path, verify)) for path in data),
        ("run directory", functools.partial(storage.storage, run_dir)),
    ]
    if network:
        checks.append(("network", data_checks.network))
    if deepspeed_config is not None:
        checks.append(("DeepSpeed JSON", functools.partial(deepspeed_json.deepspeed_json, deepspeed_config)))
    try:
        for subject, check in checks:
            yield from found_by(subject, check)
        if isinstance(ring, ChildFailed):
            yield fault("launcher", str(ring), "install DeepSpeed into this environment")
        else:
            yield from found_by("launcher", functools.partial(launcher.launcher, ring, ranks))
    finally:  # interrupted, or the reader of the output has had enough
        if isinstance(ring, Child):
            ring.end()
    if on_gpu:
        yield from found_by("kernels", gpu.kernels)


def doctor(
    data: tuple[Folder, ...] = (),
    run_dir: Folder = Path("."),
    deepspeed_config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    verify: bool = False,
    network: bool = False,
) -> None:
    """Check what runs need of an installation: versions, compiler, compiled operators and stale locks, the launcher,
    GPU and kernels, cores, memory, disk, vocabulary. Each finding is ok, a warning or a fault, with its mend; the exit
    code is 1 where there is a fault. Nothing is changed.

    Args:
        data: Folders of shards to check too.
        run_dir: A run directory, or where one would be made: its disk is measured.
        deepspeed_config: A DeepSpeed JSON to check too.
        verify: Read the shards whole and compare their checksums.
        network: See whether the Hub answers.
    """
    console = Console(highlight=False)
    findings = []
    with console.status("looking") if console.is_terminal else nullcontext():
        for finding in examine(data, run_dir, deepspeed_config, verify, network):
            findings.append(finding)
            if not console.is_terminal:
                print(finding.line(), flush=True)
    if console.is_terminal:
        console.print(_table(findings))
    faults = sum(finding.level == "fault" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"{faults} faults, {warnings} warnings, {len(findings) - faults - warnings} ok")
    sys.exit(1 if faults else 0)


def _table(findings: list[Finding]) -> Table:
    table = Table("", "what", "finding", "mend")
    for finding in findings:
        level = Text(finding.level, style=COLOURS[finding.level])
        table.add_row(level, *map(Text, (finding.subject, finding.words, finding.mend)))
    return table


@exits_with_user_errors
def main() -> None:
    tyro.cli(doctor, prog="python -m megaresid.doctor", args=sys.argv[1:])


if __name__ == "__main__":
    main()
