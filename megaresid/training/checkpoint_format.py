"""The checkpoint on disk: what its files say, whether it is complete, and reading any run of elements from it.

    RUN/checkpoints/latest                  the name of the newest checkpoint, for people and scripts
    RUN/checkpoints/step_00000200/
        rank_00000.safetensors, ...         each rank's runs; tensors "kind:name", the runs in the metadata
        checkpoint.json                     the header
        complete.json                       sizes and hashes of the files above; written last

Needs neither DeepSpeed nor a process group.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaresid.durable import sync
from megaresid.errors import UserError, suggestion
from megaresid.training.zero_state.live import PARAMETER

HEADER = "checkpoint.json"
MARKER = "complete.json"
FOLDER = "checkpoints"
LATEST = "latest"
ASIDE = ".tmp-"

_RUNS = TypeAdapter(dict[str, tuple[NonNegativeInt, NonNegativeInt]])


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


R = TypeVar("R", bound=_Record)


class Header(_Record):
    """``checkpoint.json``. Parameters by canonical name with their shapes; ``scalars`` are the optimizer's numbers by
    parameter and key; ``generators`` hold a rank's torch generator states each, by device, in base64."""

    schema_version: Literal[1] = 1
    step: int
    world_size: int
    parameters: dict[str, list[int]]
    scalars: dict[str, dict[str, int | float]]
    counters: dict[str, Any]
    engine: dict[str, int]
    generators: list[dict[str, str]]
    identity: dict[str, Any]


class FileRecord(_Record):
    """A file's size in bytes and SHA-256, hexadecimal."""

    size: int
    sha256: str


class Marker(_Record):
    """``complete.json``: the other files of a checkpoint."""

    schema_version: Literal[1] = 1
    files: dict[str, FileRecord]


def step_dir(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step_{step:08d}"


def rank_file(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank_{rank:05d}.safetensors"


def write_tensors(path: Path, tensors: dict[tuple[str, str], Tensor], runs: dict[str, tuple[int, int]]) -> FileRecord:
    """Write a rank's flat tensors, by (kind, name), to disk; ``runs`` says the (offset, length) of each name."""
    flat = {f"{kind}:{name}": tensor.cpu() for (kind, name), tensor in tensors.items()}
    save_file(flat, path, metadata={"runs": json.dumps(runs)})
    sync(path)
    return _record(path)


def write_record(path: Path, record: BaseModel) -> FileRecord:
    """Write a header or marker to disk."""
    path.write_text(json.dumps(record.model_dump(), indent=1) + "\n", encoding="utf-8")
    sync(path)
    return _record(path)


def move_into_place(aside: Path, target: Path) -> None:
    """Give a written checkpoint its name, durably; then move ``latest``."""
    sync(aside)
    os.rename(aside, target)
    sync(target.parent)
    pointer = target.parent / (ASIDE + LATEST)
    pointer.write_text(target.name + "\n", encoding="utf-8")
    sync(pointer)
    os.replace(pointer, target.parent / LATEST)
    sync(target.parent)


def complete_files(path: Path) -> dict[str, FileRecord]:
    """The files of a complete checkpoint by name, sizes checked; else ``UserError`` naming the file at fault."""
    marker = _load(path / MARKER, Marker)
    ranks = sum(name != HEADER for name in marker.files)
    if set(marker.files) != {HEADER, *map(rank_file, range(ranks))} or ranks == 0:
        raise UserError(f"{path / MARKER}: it does not list {HEADER} and one file a rank; use another checkpoint")
    for name, record in marker.files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: the file is missing, the checkpoint is damaged; use another one")
        if (size := file.stat().st_size) != record.size:
            raise UserError(f"{file}: {size} bytes where {record.size} were written; use another checkpoint")
    return marker.files


def check_hashes(path: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> None:
    """Raise ``UserError`` naming the first of ``names`` whose bytes are not those that were written."""
    for name in names:
        if _record(path / name).sha256 != files[name].sha256:
            raise UserError(f"{path / name}: the SHA-256 is not that of {MARKER}, the file is damaged; use another one")


def is_complete(path: Path) -> bool:
    """Whether all files are there in their sizes."""
    try:
        complete_files(path)
    except UserError:
        return False
    return True


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest step first."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name)]
    return sorted(filter(is_complete, found), key=lambda path: int(path.name.removeprefix("step_")))


class SavedState:
    """A complete checkpoint, open for reading; a context manager.

    ``header`` is its header. Raises ``UserError`` naming the file that is missing or not as the format says; hashes are
    not checked, so that a look at the header reads no more than the files' own headers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header = _load(path / HEADER, Header)
        self._kinds: dict[str, dict[str, torch.dtype]] = {name: {} for name in self.header.parameters}
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        self._files = ExitStack()
        try:
            for file in map(rank_file, range(self.header.world_size)):
                try:
                    self._index(path / file)
                except FileNotFoundError:
                    raise UserError(f"{path / file}: it is missing, {HEADER} counts it; use another one") from None
                except (SafetensorError, ValidationError):
                    raise UserError(f"{path / file}: its safetensors header is damaged; use another one") from None
        except BaseException:
            self.close()
            raise
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def _index(self, path: Path) -> None:
        file = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
        runs = _RUNS.validate_json((file.metadata() or {}).get("runs", ""))
        for key in file.keys():
            kind, _, name = key.partition(":")
            offset, length = runs.get(name, (0, None))
            piece = file.get_slice(key)
            if name not in self._kinds or piece.get_shape() != [length]:
                raise UserError(f"{path}: {key!r} is not as {HEADER} and its metadata say; use another checkpoint")
            self._pieces.setdefault((kind, name), []).append((offset, length, piece))
            self._kinds[name].setdefault(kind, piece[:0].dtype)

    def kinds(self, name: str) -> dict[str, torch.dtype]:
        """What is saved of a parameter: ``"parameter"`` and the optimizer's keys, with dtypes."""
        return self._kinds[name]

    def scalars(self, name: str) -> dict[str, int | float]:
        """The optimizer's numbers of a parameter."""
        return self.header.scalars.get(name, {})

    def read(self, kind: str, name: str, offset: int, out: Tensor) -> None:
        """Fill ``out`` [length], of any dtype and device, with a parameter's elements from ``offset`` on."""
        position, end = offset, offset + out.numel()
        for begin, length, piece in self._pieces.get((kind, name), []):
            if begin <= position < begin + length and position < end:
                stop = min(end, begin + length)
                out[position - offset : stop - offset].copy_(piece[position - begin : stop - begin])
                position = stop
        if position < end:
            raise UserError(f"{self.path}: no file has element {position} of {kind} {name}; use another checkpoint")

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> "SavedState":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def iterate_parameters(path: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, full fp32 tensor on the CPU) one by one, without DeepSpeed or a process group.

    ``names`` picks some, in their order. Raises ``UserError`` for a checkpoint that is incomplete or damaged (every
    file's hash is checked), or a name that it lacks.
    """
    files = complete_files(path)
    check_hashes(path, files, files)
    with SavedState(path) as saved:
        shapes = saved.header.parameters
        names = list(shapes if names is None else names)
        if unknown := [name for name in names if name not in shapes]:
            raise UserError(f"{path}: there is no parameter {unknown[0]!r}; {suggestion(unknown[0], shapes)}")
        for name in names:
            parameter = torch.empty(shapes[name], dtype=torch.float32)
            saved.read(PARAMETER, name, 0, parameter.view(-1))
            yield name, parameter


def read_parameters(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """All that ``iterate_parameters`` gives, in memory at once."""
    return dict(iterate_parameters(path, names))


def _load(path: Path, record: type[R]) -> R:
    try:
        return record.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing, the checkpoint is half-written; use another one") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}; use a checkpoint of this version of megaresid") from None
    except ValueError:
        raise UserError(f"{path}: it is not JSON, the checkpoint is damaged; use another one") from None


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
