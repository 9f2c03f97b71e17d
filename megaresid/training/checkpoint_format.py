"""The checkpoint on disk: what its files say, whether it is complete, and reading any run of elements from it.

    RUN/checkpoints/latest                  the name of the newest checkpoint, for people and scripts
    RUN/checkpoints/step_00000200/
        rank_00000.safetensors, ...         each rank's runs; tensors "kind:name", the runs in the metadata
        checkpoint.json                     the header
        complete.json                       sizes and hashes of the files above; written last

The files of the ranks are written here rather than by safetensors, which would hold all their bytes a second time, and
not say which error the disk gave; their hashes are taken on the way, of the bytes that were meant.

Needs neither DeepSpeed nor a process group.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaresid.durable import forget, sync
from megaresid.errors import UserError, suggestion
from megaresid.json_text import parse_json
from megaresid.training.agreement import DamagedCheckpoint
from megaresid.training.zero_state.live import PARAMETER

HEADER = "checkpoint.json"
MARKER = "complete.json"
FOLDER = "checkpoints"
LATEST = "latest"
ASIDE = ".tmp-"
AT_ONCE = 16 * 2**20
"""Bytes that are hashed and written at once."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In safetensors' words."""

_RUNS = TypeAdapter(dict[str, tuple[NonNegativeInt, NonNegativeInt]])


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


R = TypeVar("R", bound=_Record)


class Header(_Record):
    """``checkpoint.json``. Parameters by canonical name with their shapes; ``scalars`` are the optimizer's numbers by
    parameter and key; ``generators`` hold a rank's torch generator states each, by device, in base64."""

    schema_version: Literal[1] = 1
    step: NonNegativeInt
    world_size: PositiveInt
    parameters: dict[str, list[NonNegativeInt]]
    scalars: dict[str, dict[str, int | float]]
    counters: dict[str, Any]
    engine: dict[str, NonNegativeInt]
    generators: list[dict[str, str]]
    identity: dict[str, Any]

    @model_validator(mode="after")
    def _of_every_rank(self):
        if len(self.generators) != self.world_size:
            raise ValueError(f"generators of {len(self.generators)} ranks, where world_size is {self.world_size}")
        return self


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


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step_"))


@dataclass(frozen=True)
class Layout:
    """A rank's file: its safetensors ``header``, then ``size`` bytes, where the flat tensor of each (kind, name) has
    those from ``begin`` to ``end``."""

    header: bytes
    places: list[tuple[tuple[str, str], int, int]]
    size: int


def layout_of(tensors: Mapping[tuple[str, str], Tensor], runs: Mapping[str, tuple[int, int]]) -> Layout:
    """The layout for flat tensors by (kind, name); ``runs`` says the (offset, length) of each name."""
    header: dict[str, Any] = {"__metadata__": {"runs": json.dumps(runs)}}
    places, end = [], 0
    # Wide elements first: then every tensor stands where its elements are aligned.
    for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
        tensor = tensors[key]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        places.append((key, begin, end))
        header[":".join(key)] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": [tensor.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return Layout(len(text).to_bytes(8, "little") + text, places, end)


def fill(elements: Tensor, layout: Layout, tensors: Mapping[tuple[str, str], Tensor]) -> None:
    """Copy flat tensors to their places in ``elements``, uint8 [layout.size]. From a GPU into pinned memory the copies
    are complete once the current stream is."""
    for key, begin, end in layout.places:
        elements[begin:end].view(tensors[key].dtype).copy_(tensors[key], non_blocking=True)


def write_elements(path: Path, layout: Layout, elements: Tensor) -> FileRecord:
    """Write a rank's file to disk; ``elements`` uint8 [layout.size], on the CPU."""
    data = memoryview(elements.numpy())
    return _write(path, [layout.header, *(data[at : at + AT_ONCE] for at in range(0, layout.size, AT_ONCE))])


def write_record(path: Path, record: BaseModel) -> FileRecord:
    """Write a header or marker to disk."""
    return _write(path, [json.dumps(record.model_dump(), indent=1).encode() + b"\n"])


def _write(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
        forget(file)
    return FileRecord(size=size, sha256=digest.hexdigest())


def move_into_place(aside: Path, target: Path) -> None:
    """Give a written checkpoint its name, durably; then move ``latest``."""
    sync(aside)
    os.rename(aside, target)
    sync(target.parent)
    pointer = target.parent / (ASIDE + LATEST)
    _write(pointer, [target.name.encode() + b"\n"])
    os.replace(pointer, target.parent / LATEST)
    sync(target.parent)


def complete_files(path: Path) -> dict[str, FileRecord]:
    """The files of a complete checkpoint by name: sizes are checked, and the header's hash; else ``DamagedCheckpoint``
    naming the file at fault."""
    marker = _load(path / MARKER, Marker)
    ranks = sum(name != HEADER for name in marker.files)
    if set(marker.files) != {HEADER, *map(rank_file, range(ranks))} or ranks == 0:
        raise DamagedCheckpoint(f"{path / MARKER}: it does not list {HEADER} and one file a rank; use another one")
    for name, record in marker.files.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file}: the file is missing, the checkpoint is damaged; use another one")
        if (size := file.stat().st_size) != record.size:
            raise DamagedCheckpoint(f"{file}: {size} bytes where {record.size} were written; use another checkpoint")
    for file in sorted(path.glob("rank_*.safetensors")):
        if file.name not in marker.files:
            raise DamagedCheckpoint(f"{file}: {MARKER} does not list it, it is of another checkpoint; remove it")
    check_hashes(path, marker.files, [HEADER])
    return marker.files


def check_hashes(path: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> None:
    """Raise ``DamagedCheckpoint`` naming the first of ``names`` whose bytes are not those that were written."""
    for name in names:
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != files[name].sha256:
            raise DamagedCheckpoint(
                f"{path / name}: the SHA-256 is not that of {MARKER}, the file is damaged; use another one"
            )


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
    return sorted(filter(is_complete, found), key=step_of)


def read_header(path: Path) -> Header:
    """The header of a complete checkpoint, without a look at the ranks' files."""
    return _load(path / HEADER, Header)


class SavedState:
    """A complete checkpoint, open for reading; a context manager.

    ``header`` is its header. Raises ``UserError`` naming the file that is missing or not as the format says; hashes are
    not checked, so that a look at the header reads no more than the files' own headers.
    """

    def __init__(self, path: Path):
        self.path = path
        self.header = read_header(path)
        self._kinds: dict[str, dict[str, torch.dtype]] = {name: {} for name in self.header.parameters}
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        self._files = ExitStack()
        try:
            for file in map(rank_file, range(self.header.world_size)):
                try:
                    self._index(path / file)
                except FileNotFoundError:
                    raise DamagedCheckpoint(f"{path / file}: missing, {HEADER} counts it; use another one") from None
                except (SafetensorError, ValidationError):
                    raise DamagedCheckpoint(f"{path / file}: its safetensors header is damaged; use another") from None
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

    def check_length(self, kind: str, name: str, elements: int) -> None:
        """Raise ``UserError`` where the files have fewer elements of a parameter than so many."""
        found = sum(length for _, length, _ in self._pieces.get((kind, name), []))
        if found < elements:
            raise UserError(f"{self.path}: the files have {found} of {elements} elements of {name}; use another one")

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
            saved.check_length(PARAMETER, name, math.prod(shapes[name]))  # before memory is taken for it
            parameter = torch.empty(shapes[name], dtype=torch.float32)
            saved.read(PARAMETER, name, 0, parameter.view(-1))
            yield name, parameter


def read_parameters(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """All that ``iterate_parameters`` gives, in memory at once."""
    return dict(iterate_parameters(path, names))


def _load(path: Path, record: type[R]) -> R:
    try:
        return record.model_validate(parse_json(path.read_bytes()))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: the file is missing, the checkpoint is half-written; use another") from None
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}, the checkpoint is damaged; use another one") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}; use a checkpoint of this version of megaresid") from None
    except ValueError:
        raise DamagedCheckpoint(f"{path}: it is not JSON, the checkpoint is damaged; use another one") from None
