"""One process of a machine goes first, so that its ranks do not all download the same."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def first_alone(wanted: bool = True) -> Iterator[None]:
    """Of the user's processes on this machine that come to the block, the first runs it alone; those that find it
    there wait until it is done, and then run the block at once, all together. What it fetched is in the cache by then.

    There is no process group yet, so a file's lock tells them of each other; the system opens it when its holder dies.
    """
    if not wanted:
        yield
        return
    path = Path(tempfile.gettempdir()) / f"megaresid-{os.getuid()}.lock"
    with open(path, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH)
            fcntl.flock(lock, fcntl.LOCK_UN)
        yield
