"""DeepSpeed's compiled operators: whether they are built, and locks that nobody holds."""

from collections.abc import Iterator
from pathlib import Path

from megaresid.checks.finding import Finding, fault, ok, warning
from megaresid.training.compiled_ops import stale_locks


def built(folder: Path) -> list[Path]:
    """The libraries under the folder of compiled operators."""
    return sorted(folder.glob("**/*.so"))


def operators(folder: Path, on_gpu: bool) -> Iterator[Finding]:
    for lock in stale_locks(folder):
        yield fault(
            "compiled operators",
            f"{lock} was left by a build that was killed; DeepSpeed alone would wait for it for ever",
            f"rm {lock} (a start of megaresid.train removes it too)",
        )
    if libraries := built(folder):
        yield ok("compiled operators", f"{', '.join(library.stem for library in libraries)} in {folder}")
    elif on_gpu:
        yield ok("compiled operators", "none, and runs on a GPU need none")
    else:
        yield warning(
            "compiled operators",
            f"none in {folder}, the first run builds them, for minutes",
            "python -m megaresid.training.compiled_ops builds them now",
        )
