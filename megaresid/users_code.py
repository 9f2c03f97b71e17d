"""A user's own classes: which they are, from where they may come, and their mistakes told as a user's are."""

import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from megaresid.errors import UserError

CLASSES: list[type] = []
"""Those that layer specs have named by ``module:Class``."""

_loaded: ContextVar[Path | None] = ContextVar("loaded", default=None)


@contextmanager
def none_from(folder: Path) -> Iterator[None]:
    """No class comes from a module in ``folder`` meanwhile: somebody else's run may name one that lies beside it, and
    to load a model must not execute what came with it, also where that is the current folder."""
    token = _loaded.set(folder.resolve())
    try:
        yield
    finally:
        _loaded.reset(token)


def check_origin(module: str) -> None:
    """Raise UserError for a module that would be imported from the folder that is being loaded; imports nothing."""
    if (folder := _loaded.get()) is None:
        return
    try:
        found = importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        return  # importing it says why
    places = [found.origin, *(found.submodule_search_locations or ())] if found else []
    for place in filter(None, places):
        if Path(place).resolve().is_relative_to(folder):
            raise UserError(
                f"module {module!r} is {place}, inside what is being loaded, whose code is not executed: if you trust "
                "it, copy it to a folder of your own on PYTHONPATH"
            )


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
    # A class whose module has been taken out of the process has no file any more.
    files = {cls: sys.modules[cls.__module__].__file__ for cls in CLASSES if cls.__module__ in sys.modules}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files.values()]
    if frames:
        return f"{frames[-1].filename}, line {frames[-1].lineno}"
    # A call that does not fit a signature fails before the class's own code runs.
    named = [cls for cls in files if isinstance(error, TypeError) and f"{cls.__qualname__}." in str(error)]
    return f"{files[named[0]]}, class {named[0].__qualname__}" if named else None
