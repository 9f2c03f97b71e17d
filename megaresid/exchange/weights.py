"""Weights in safetensors files of bounded size, laid out as ``transformers`` writes and reads them.

One file is ``model.safetensors``. Several are ``model-00001-of-00003.safetensors``, ... and beside them
``model.safetensors.index.json``, whose ``weight_map`` says the file of each tensor.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaresid.durable import sync
from megaresid.errors import UserError
from megaresid.json_text import parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FILE_BYTES = 2**30
FP32_BYTES = 4


def write_weights(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, Tensor]],
    say: Callable[[str], None],
    file_bytes: int = FILE_BYTES,
) -> list[Path]:
    """Write fp32 tensors, which come in the order of ``shapes``; the files, durably on disk. No more than one file's
    tensors are in memory; a tensor above ``file_bytes`` has a file of its own."""
    groups = _grouped(shapes, file_bytes)
    single = len(groups) == 1
    names = [SINGLE if single else f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    waiting = iter(tensors)
    for file, group in zip(names, groups):
        held = {name: next(waiting) for name in group}
        for name, (given, tensor) in held.items():
            if given != name or list(tensor.shape) != list(shapes[name]) or tensor.dtype != torch.float32:
                raise ValueError(f"{given} {list(tensor.shape)} {tensor.dtype} came for {name} {list(shapes[name])}")
        save_file({name: tensor.contiguous() for name, (_, tensor) in held.items()}, folder / file, {"format": "pt"})
        (folder / file).chmod(folder.stat().st_mode & 0o666)  # save_file makes it for its owner alone
        sync(folder / file)
        say(f"wrote     {file}, {(folder / file).stat().st_size / 2**20:,.1f} MiB")
        del held, tensor  # before the next file's are read
    written = [folder / file for file in names]
    if not single:
        weight_map = {name: file for file, group in zip(names, groups) for name in group}
        total = sum(map(_bytes, shapes.values()))
        tree = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
        sync(folder / INDEX)
        written.append(folder / INDEX)
    return written


def _grouped(shapes: Mapping[str, Sequence[int]], file_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    room = file_bytes
    for name, shape in shapes.items():
        if groups[-1] and _bytes(shape) > room:
            groups.append([])
            room = file_bytes
        groups[-1].append(name)
        room -= _bytes(shape)
    return groups


def _bytes(shape: Sequence[int]) -> int:
    return FP32_BYTES * prod(shape)


class Weights:
    """The safetensors files of a folder, open for reading; a context manager. Nothing is unpickled.

    ``shapes`` has every tensor by name. Raises UserError naming the file that is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        self._files: dict[str, tuple[Path, safe_open]] = {}
        with ExitStack() as opening:
            for path in _files_of(folder):
                try:
                    file = opening.enter_context(safe_open(path, framework="pt", device="cpu"))
                except (OSError, SafetensorError) as error:
                    raise UserError(f"{path}: cannot be read as safetensors: {error}") from None
                for name in file.keys():
                    self.shapes[name] = file.get_slice(name).get_shape()
                    self._files[name] = path, file
            self._open = opening.pop_all()

    def read(self, name: str) -> Tensor:
        """A tensor in its own dtype."""
        path, file = self._files[name]
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path}: {name} cannot be read: {error}") from None

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *exception) -> None:
        self._open.close()


def _files_of(folder: Path) -> Iterator[Path]:
    if (folder / SINGLE).is_file():
        yield folder / SINGLE
        return
    if not (folder / INDEX).is_file():
        raise UserError(f"{folder}: there are no weights in it: neither {SINGLE} nor {INDEX}")
    try:
        names = sorted(set(parse_json((folder / INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / INDEX}: not an index of safetensors files: get a good copy") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"{folder / INDEX}: {name!r} is not the name of a file beside it")
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: the file is missing, {INDEX} names it")
        yield folder / name
