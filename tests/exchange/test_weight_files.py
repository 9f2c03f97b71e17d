"""Safetensors files of bounded size."""

import json

import pytest
import torch
from safetensors.torch import load_file

from megaresid.errors import UserError
from megaresid.exchange.weights import INDEX, SINGLE, Weights, write_weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4), "c": torch.full((3, 3), -2.0), "d": torch.zeros(1)}
SHAPES = {name: list(tensor.shape) for name, tensor in TENSORS.items()}


def write(folder, file_bytes, **changes):
    return write_weights(folder, SHAPES, (TENSORS | changes).items(), lambda line: None, file_bytes)


@pytest.mark.parametrize(
    "file_bytes, files",
    [(76 + 4, [SINGLE]), (40, [["a", "b"], ["c", "d"]]), (39, [["a"], ["b"], ["c"], ["d"]]), (1, ["a", "b", "c", "d"])],
)
def test_tensors_fill_files_in_their_order_up_to_a_size(tmp_path, file_bytes, files):
    written = write(tmp_path, file_bytes)
    with Weights(tmp_path) as weights:
        assert weights.shapes == SHAPES
        assert all(torch.equal(weights.read(name), tensor) for name, tensor in TENSORS.items())
    if files == [SINGLE]:
        assert [path.name for path in written] == [SINGLE]
        return
    names = [f"model-0000{n}-of-0000{len(files)}.safetensors" for n in range(1, len(files) + 1)]
    assert [path.name for path in written] == [*names, INDEX]
    assert [sorted(load_file(tmp_path / name)) for name in names] == [list(group) for group in files]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * 20
    assert index["weight_map"] == {tensor: name for name, group in zip(names, files) for tensor in group}


def test_only_one_files_tensors_are_taken_at_a_time(tmp_path):
    taken, held = [], []

    def tensors():
        for name, tensor in TENSORS.items():
            taken.append(name)
            yield name, tensor

    write_weights(tmp_path, SHAPES, tensors(), lambda line: held.append(list(taken)), file_bytes=40)
    assert held == [["a", "b"], ["a", "b", "c", "d"]]


@pytest.mark.parametrize("wrong", [{"b": torch.ones(5)}, {"b": torch.ones(4, dtype=torch.float64)}])
def test_another_shape_or_dtype_is_not_written(tmp_path, wrong):
    with pytest.raises(ValueError, match="came for b"):
        write(tmp_path, 40, **wrong)


def test_others_may_read_what_others_may_see(tmp_path):
    tmp_path.chmod(0o750)
    (path,) = write(tmp_path, 1000)
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.*is missing"),
        (lambda folder: (folder / INDEX).unlink(), "no weights in it"),
        (lambda folder: (folder / INDEX).write_text("{"), "not an index"),
        (lambda folder: (folder / INDEX).write_text("[]"), "not an index"),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "../x"}}'), "not the name of a file beside"),
        (lambda folder: (folder / "model-00001-of-00002.safetensors").write_bytes(b"ab"), "cannot be read"),
    ],
)
def test_a_damaged_folder_is_named(tmp_path, damage, message):
    write(tmp_path, 40)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        Weights(tmp_path)
