"""The files that --input names."""

import glob
from pathlib import Path

from data_prep.sources.source import File
from megaresid.errors import UserError


def find_files(inputs: tuple[str, ...], suffixes: tuple[str, ...]) -> list[File]:
    """The files that the inputs name, each once (also by another spelling or a link), in the order of the inputs and
    sorted by path within one.

    A folder, named or matched by a pattern, stands for the files in and below it with one of the suffixes; a file is
    taken as it is.
    Raises UserError for an input that gives none.
    """
    found: dict[Path, Path] = {}
    for name in inputs:
        path = Path(name)
        places = [path] if path.exists() else sorted(Path(match) for match in glob.glob(name, recursive=True))
        files = [file for place in places for file in _files_of(place, suffixes)]
        if not files:
            kinds = f"no {' or '.join(suffixes)} files in it" if path.is_dir() else "no such file, folder or match"
            raise UserError(f"--input {name}: {kinds}; check the path")
        for path in files:
            found.setdefault(path.resolve(), path)
    return [local_file(path) for path in found.values()]


def _files_of(place: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.name.endswith(suffixes) and file.is_file())
    return [place] if place.is_file() else []


def local_file(path: Path) -> File:
    status = path.stat()
    return File(str(path), status.st_size, str(status.st_mtime_ns))
