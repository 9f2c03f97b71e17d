"""The files, written here by the format's description alone; read back whole, or named when they are not as written."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megaresid.errors import UserError
from megaresid.training.checkpoint import find_checkpoint, read_parameters
from megaresid.training.checkpoint_format import SavedState

PARAMETERS = {"a.weight": torch.arange(15.0).view(3, 5), "b": torch.tensor([7.0])}


def write(path: Path, runs: list[dict[str, tuple[int, int]]], parameters=PARAMETERS, **changes) -> Path:
    """A checkpoint whose rank ``r`` has the runs ``runs[r]``, name: (offset, length), of the parameters."""
    path.mkdir(parents=True)
    for rank, mine in enumerate(runs):
        tensors = {
            f"parameter:{name}": parameters[name].reshape(-1)[offset : offset + length].clone()
            for name, (offset, length) in mine.items()
        }
        save_file(tensors, path / f"rank_{rank:05d}.safetensors", metadata={"runs": json.dumps(mine)})
    header = {
        "schema_version": 1,
        "step": 5,
        "world_size": len(runs),
        "parameters": {name: list(value.shape) for name, value in parameters.items()},
        "scalars": {},
        "counters": {},
        "engine": {},
        "generators": [{}] * changes.get("world_size", len(runs)),
        "identity": {},
    }
    (path / "checkpoint.json").write_text(json.dumps(header | changes))
    files = {
        file.name: {"size": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in path.iterdir()
    }
    (path / "complete.json").write_text(json.dumps({"schema_version": 1, "files": files}))
    return path


HALVES = [{"a.weight": (0, 7), "b": (0, 1)}, {"a.weight": (7, 8)}]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_cutting_into_runs_reads_back_at_any_offset(tmp_path_factory, data):
    sizes = {"x": data.draw(st.integers(1, 20)), "y": data.draw(st.integers(1, 20))}
    parameters = {name: torch.randn(size) for name, size in sizes.items()}
    ranks = data.draw(st.integers(1, 4))
    runs: list[dict[str, tuple[int, int]]] = [{} for _ in range(ranks)]
    for name, size in sizes.items():
        cuts = sorted(data.draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1)))
        pieces = list(zip([0, *cuts], [*cuts, size]))
        for rank, (begin, end) in zip(data.draw(st.permutations(range(ranks))), pieces):
            if begin < end:
                runs[rank][name] = begin, end - begin
    path = write(tmp_path_factory.mktemp("cut") / "step_00000005", runs, parameters)
    for name, value in read_parameters(path).items():
        assert torch.equal(value, parameters[name])
    begin = data.draw(st.integers(0, sizes["x"]))
    end = data.draw(st.integers(begin, sizes["x"]))
    out = torch.full((end - begin,), torch.nan)
    with SavedState(path) as saved:
        saved.read("parameter", "x", begin, out)
    assert torch.equal(out, parameters["x"][begin:end])


@pytest.mark.parametrize(
    "twice, message",
    [([], "have 14 of 15 elements of a.weight"), ([{"a.weight": (0, 1)}], "element 7 of parameter a.weight")],
    ids=["fewer", "as many"],
)
def test_a_gap_between_the_runs_is_an_error(tmp_path, twice, message):
    path = write(tmp_path / "step_00000005", [{"a.weight": (0, 7), "b": (0, 1)}, {"a.weight": (8, 7)}, *twice])
    with pytest.raises(UserError, match=message):
        read_parameters(path)


def test_the_newest_complete_checkpoint_of_a_run_is_found(tmp_path):
    assert find_checkpoint(tmp_path) is None
    old = write(tmp_path / "checkpoints" / "step_00000005", HALVES)
    new = write(tmp_path / "checkpoints" / "step_00000010", HALVES)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000099\n")
    assert find_checkpoint(tmp_path) == new
    assert find_checkpoint(tmp_path / "checkpoints") == new
    (new / "complete.json").unlink()
    assert find_checkpoint(tmp_path) == old
    assert find_checkpoint(old) == old
    with pytest.raises(UserError, match="nowhere: there is no such"):
        find_checkpoint(tmp_path / "nowhere")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path, at: int = -1, mask: int = 1) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= mask
    file.write_bytes(damaged)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("rank_00001.safetensors", cut, "rank_00001.safetensors: .* bytes"),
        ("rank_00001.safetensors", Path.unlink, "rank_00001.safetensors: the file is missing"),
        ("checkpoint.json", Path.unlink, "checkpoint.json: the file is missing"),
        ("checkpoint.json", cut, "checkpoint.json: .* bytes"),
        ("checkpoint.json", flip, "checkpoint.json: the SHA-256"),
        ("complete.json", Path.unlink, "complete.json: the file is missing"),
        ("complete.json", cut, "complete.json: it is not JSON"),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over_and_an_error_when_named(tmp_path, name, damage, message):
    path = write(tmp_path / "checkpoints" / "step_00000005", HALVES)
    damage(path / name)
    with pytest.raises(UserError, match=message):
        find_checkpoint(path)
    with pytest.raises(UserError, match=message):
        read_parameters(path)
    assert find_checkpoint(tmp_path) is None


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00001.safetensors"])
def test_other_bytes_than_were_written_are_found_by_reading_not_by_finding(tmp_path, name):
    path = write(tmp_path / "checkpoints" / "step_00000005", HALVES)
    flip(path / name)
    assert find_checkpoint(tmp_path) == find_checkpoint(path) == path
    with pytest.raises(UserError, match=f"{name}: the SHA-256"):
        read_parameters(path)


def test_any_flipped_byte_of_a_safetensors_header_is_read_or_is_an_error_naming_the_file(tmp_path):
    path = write(tmp_path / "step_00000005", HALVES)
    file = path / "rank_00001.safetensors"
    written = file.read_bytes()
    refused = 0
    for at in range(8 + int.from_bytes(written[:8], "little")):
        for mask in (0x01, 0x20, 0x80):
            flip(file, at, mask)
            try:
                SavedState(path).close()
            except UserError as error:
                assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
                refused += 1
            with pytest.raises(UserError, match="rank_00001.safetensors: the SHA-256"):
                read_parameters(path)
            file.write_bytes(written)
    flip(file, 12)
    with pytest.raises(UserError, match="rank_00001.safetensors: its safetensors header is damaged"):
        SavedState(path)
    assert refused > len(written) / 2  # a flipped space, or letter of an optimizer's key, is a header still


@pytest.mark.parametrize("length", [0, 4, 8, 30, 150, -1])
def test_a_truncated_file_is_an_error_naming_it(tmp_path, length):
    path = write(tmp_path / "step_00000005", HALVES)
    file = path / "rank_00001.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="rank_00001.safetensors: its safetensors header is damaged"):
        SavedState(path)
    with pytest.raises(UserError, match="rank_00001.safetensors: .* bytes"):
        read_parameters(path)


@pytest.mark.parametrize(
    "metadata, message",
    [
        (None, "header is damaged"),
        ({"other": "{}"}, "header is damaged"),
        ({"runs": '{"a.weight": (7'}, "header is damaged"),
        ({"runs": '{"a.weight": [7]}'}, "header is damaged"),
        ({"runs": '{"a.weight": [-7, 8]}'}, "header is damaged"),
        ({"runs": "[]"}, "header is damaged"),
        ({"runs": "{}"}, "'parameter:a.weight' is not as"),
        ({"runs": '{"a.weight": [7, 9]}'}, "'parameter:a.weight' is not as"),
    ],
)
def test_runs_that_the_metadata_do_not_say_are_an_error_naming_the_file(tmp_path, metadata, message):
    path = write(tmp_path / "step_00000005", HALVES)
    save_file({"parameter:a.weight": torch.arange(7.0, 15.0)}, path / "rank_00001.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=f"rank_00001.safetensors: .*{message}"):
        SavedState(path)


def test_a_rank_that_the_header_counts_and_no_file_holds_is_an_error_naming_the_file(tmp_path):
    path = write(tmp_path / "step_00000005", HALVES, world_size=3)
    with pytest.raises(UserError, match="rank_00002.safetensors: missing"):
        read_parameters(path)


def test_a_marker_cannot_name_files_elsewhere(tmp_path):
    path = write(tmp_path / "step_00000005", HALVES)
    marker = json.loads((path / "complete.json").read_text())
    marker["files"]["../rank_00002.safetensors"] = marker["files"]["rank_00001.safetensors"]
    (path / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(UserError, match="complete.json: it does not list"):
        find_checkpoint(path)


def test_another_schema_version_is_an_error(tmp_path):
    path = write(tmp_path / "step_00000005", HALVES, schema_version=2)
    with pytest.raises(UserError, match="checkpoint.json: schema_version"):
        read_parameters(path)


def test_reading_parameters_needs_no_deepspeed(tmp_path):
    path = write(tmp_path / "step_00000005", HALVES)
    code = (
        "import sys; from pathlib import Path; from megaresid.training.checkpoint import read_parameters;"
        "print(read_parameters(Path(sys.argv[1]))['b'].item(), 'deepspeed' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7.0", "False"]
