"""Files that are on the disk whole, or not at all."""

import os
from pathlib import Path
from typing import IO


def write_text(path: Path, text: str) -> None:
    """Write the file beside its place, and put it there when the disk has it; a power cut leaves it or none."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's names: else its new files may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget(file: IO) -> None:
    """Give back the memory in which the system keeps what the disk has of a file that is not read soon again. A job
    that writes more than the memory holds then reuses the same, and leaves what others have there."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
