"""A user's own classes: which they are, and their mistakes told as a user's are."""

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from megaresid.errors import UserError

CLASSES: list[type] = []
"""Those that layer specs have named by ``module:Class``."""


@contextmanager
def mistakes_told() -> Iterator[None]:
    """What a user's class raises, or is called in a way that it does not take, becomes a UserError that says where; an
    exception of the project's own code stays whole."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (place := _place(error)) is None:
            raise
        raise UserError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _place(error: Exception) -> str | None:
    files = {inspect.getfile(cls) for cls in CLASSES}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    if frames:
        return f"{frames[-1].filename}, line {frames[-1].lineno}"
    # A call that does not fit a signature fails before the class's own code runs.
    named = [cls for cls in CLASSES if isinstance(error, TypeError) and f"{cls.__qualname__}." in str(error)]
    return f"{inspect.getfile(named[0])}, class {named[0].__qualname__}" if named else None
