"""Going back: to which checkpoint a run that has gone wrong returns, and past which batches."""

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megaresid.training.agreement import agreed
from megaresid.training.checkpoint_format import ASIDE, FOLDER, checkpoints_in, read_header
from megaresid.training.health import Health
from megaresid.training.loop import Outcome

AT_MOST = 3
"""Returns to one checkpoint; where other batches end in the same place that often, the fault is not in the batches."""


@dataclass(frozen=True)
class Back:
    """A return to ``checkpoint``, of step ``step``. From there on step n trains on batch n + ``skipped_batches``: on
    what comes after the batch of the last bad step. Where that one is damaged, it is to an older one, and past as many
    batches more.

    All batches between are passed over, the good ones too: a skipped update changes nothing, so that training on those
    again would lead to the very state in which the bad ones came.
    """

    checkpoint: Path
    step: int
    skipped_batches: int


class Rollbacks:
    """Chooses returns, and ends them where they do not help. Every rank makes one, and calls it alike."""

    def __init__(self, run_dir: Path):
        self._checkpoints = run_dir / FOLDER
        self._made: Counter[int] = Counter()

    def decide(self, wanted: bool, health: Health, skipped_batches: int) -> tuple[Back | Outcome, str]:
        """How a run goes on from the bad step that ``health`` has judged last, and a line that says so.

        ``wanted``: it is to go back if it can; ``skipped_batches`` were skipped by returns before.
        """
        found = [None]
        with agreed(f"checkpoints of {self._checkpoints}"):
            if dist.get_rank() == 0:
                found = [newest_healthy(self._checkpoints)]
        dist.broadcast_object_list(found, src=0)
        last, verdict = found[0], health.verdict
        what = f"step {verdict.step}: {health.bad_in_a_row} bad steps in a row"
        step = int(last.name.removeprefix("step_")) if last else 0
        if wanted and last and self._made[step] < AT_MOST:
            self._made[step] += 1
            with agreed(f"checkpoints of {self._checkpoints}"):
                if dist.get_rank() == 0:
                    _remove_newer(self._checkpoints, last)
            back = Back(last, step, skipped_batches + verdict.step - step)
            return back, f"{what}: going back to {last.name}, and past the batches of {verdict.step - step} steps"
        tried = f" after going back to it {AT_MOST} times" if wanted and last else ""
        good = f"the last good checkpoint is {last.name}" if last else "there is no checkpoint"
        return Outcome.UNHEALTHY, f"{what}: the run stops{tried}; {good}; look into it by python -m megaresid.replay"


def newest_healthy(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint that was not saved (on a signal, say) between skipped updates."""
    for path in reversed(checkpoints_in(checkpoints)):
        if not read_header(path).counters.get("health", {}).get("bad_in_a_row"):
            return path
    return None


def _remove_newer(checkpoints: Path, last: Path) -> None:
    """Remove the checkpoints that were saved between skipped updates: their steps come again."""
    for path in checkpoints_in(checkpoints):
        if path.name > last.name:
            # Renamed first: a removal that is interrupted leaves nothing that has a checkpoint's name.
            shutil.rmtree(path.rename(checkpoints / f"{ASIDE}old-{path.name}"), ignore_errors=True)
