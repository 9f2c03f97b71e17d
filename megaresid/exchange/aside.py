"""A folder that is there whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megaresid.durable import sync
from megaresid.errors import UserError


def check_new(out: Path) -> None:
    """Raise UserError where something stands at ``--out``."""
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out} is there already and is not overwritten: choose another folder")


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """A new folder beside ``out`` that takes its name when the block has ended, and goes where it fails."""
    check_new(out)
    target = out.absolute()
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.iterdir(), aside):
            sync(path)
        check_new(out)
        os.rename(aside, target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror or error}: nothing was kept") from error
    except SafetensorError as error:
        raise UserError(f"--out {out} cannot be written: {error}: nothing was kept") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
