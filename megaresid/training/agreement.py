"""Ranks that tell each other small values, and agree on what has failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megaresid.errors import UserError


class CheckpointError(Exception):
    """A fault on some rank (a full disk, a folder it cannot see) that ended a save or load on all of them."""


class DamagedCheckpoint(UserError):
    """A checkpoint whose files are not those that were written; the message names the file."""


KINDS: dict[str, type[UserError]] = {kind.__name__: kind for kind in (UserError, DamagedCheckpoint)}


class Ranks:
    """The ranks of a process group, by default of all. Every method is called by every rank of it, by one thread."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def gathered(self, mine: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        values = [None] * self.count
        dist.all_gather_object(values, mine, group=self._group)
        return values

    @contextmanager
    def agreed(self, what: str) -> Iterator[None]:
        """A stretch of work without collectives whose failure on any rank is raised on every rank: the first rank's
        ``UserError`` as one of its kind, any other as a ``CheckpointError``."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        for rank, report in enumerate(self.gathered(_report(failure))):
            if report is None:
                continue
            kind, text = report
            if kind in KINDS:
                raise KINDS[kind](text) from failure
            raise CheckpointError(f"{what}: rank {rank}: {kind}: {text}") from failure


def _report(failure: Exception | None) -> tuple[str, str] | None:
    if failure is None:
        return None
    kind = type(failure).__name__
    if isinstance(failure, UserError) and kind not in KINDS:
        kind = UserError.__name__
    return kind, str(failure)


def agreed(what: str):
    """``Ranks.agreed`` among all ranks."""
    return Ranks().agreed(what)
