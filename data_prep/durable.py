"""Files that are on the disk whole, or not at all."""

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write the file beside its place, and put it there when the disk has it; a power cut leaves it or none."""
    partial = partial_of(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def partial_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def sync_folder(folder: Path) -> None:
    """Put the folder's list of names on the disk, without which its new files may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
