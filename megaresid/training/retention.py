"""Which checkpoints of a run are kept, and what is removed before and after a new one is written."""

import errno
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from megaresid.errors import UserError
from megaresid.training.checkpoint_format import ASIDE, LATEST, checkpoints_in, is_complete, step_of

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Retention:
    """Keep the newest ``newest`` checkpoints (0 for all) and those of every ``every``-th step (0 for none)."""

    newest: int = 0
    every: int = 0

    def outdated(self, folder: Path, coming: int = 0) -> list[Path]:
        """The complete checkpoints of a folder that need not be kept once ``coming`` more are there, oldest first.

        Never the newest one that is there, nor what ``latest`` names.
        """
        found = checkpoints_in(folder)
        newest = max(self.newest - coming, 1)
        if not self.newest or len(found) <= newest:
            return []
        pointer = folder / LATEST
        latest = pointer.read_text(encoding="utf-8").strip() if pointer.exists() else ""
        passing = [path for path in found[:-newest] if not self.every or step_of(path) % self.every]
        return [path for path in passing if path.name != latest]


def make_room(folder: Path, target: Path, needed: int, retention: Retention) -> None:
    """Before ``needed`` bytes are written for ``target``: remove what earlier saves left unfinished, and a damaged
    checkpoint of the same step; where the disk is short of space, also what the new one would make outdated.

    Raises ``UserError`` for a complete checkpoint of that step, and ``OSError`` where the disk stays short of space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if is_complete(target):
            raise UserError(f"{target} is there already and is not overwritten: resume from it, or move it away")
        os.rename(target, folder / (ASIDE + "damaged-" + target.name))
    for leftover in folder.glob(ASIDE + "*"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for old in retention.outdated(folder, coming=1):
        if shutil.disk_usage(folder).free >= needed:
            break
        _remove(old)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, out_of_space(folder, needed))


def out_of_space(folder: Path, needed: int) -> str:
    """What is said of a save for which a disk is short of space."""
    return f"No space left: {needed:,} bytes needed, {shutil.disk_usage(folder).free:,} free in {folder}"


def retain(folder: Path, retention: Retention) -> None:
    """Remove the complete checkpoints that need not be kept."""
    for old in retention.outdated(folder):
        _remove(old)


def _remove(checkpoint: Path) -> None:
    # Renamed first: a removal that is interrupted leaves nothing that has a checkpoint's name.
    gone = checkpoint.rename(checkpoint.with_name(ASIDE + "old-" + checkpoint.name))
    shutil.rmtree(gone, ignore_errors=True)
