"""Looking into a checkpoint: the numbers of the model that it holds, its figures, and what cannot be looked into."""

import errno
import json

import numpy as np
import pytest
import torch
from made_runs import configuration, made_run

from data_prep.adopt import adopt
from megaresid.data.manifest import load_manifest
from megaresid.data.shards import pack_header
from megaresid.errors import UserError
from megaresid.exchange.write import write_exported
from megaresid.inspect import inspect
from megaresid.monitoring.probe import probe
from megaresid.saved_run import open_saved
from megaresid.training.run_dir import write_json

CONTEXT = 12
TRAINING, VALIDATION = np.arange(200) % 90, 100 + np.arange(40)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, ids in (("train_0.bin", TRAINING), ("val_0.bin", VALIDATION)):
        ids = [50256, *map(int, ids)]
        (folder / name).write_bytes(pack_header(len(ids)) + b"".join(token.to_bytes(2, "little") for token in ids))
    adopt(folder)
    return folder


@pytest.fixture
def run(tmp_path, data):
    """With a checkpoint of step 3, and its data on record."""
    config = configuration(residual="hyper_connections", data=[str(data)], eval="validation@end")
    identity = load_manifest(data).identity
    made_run(tmp_path / "run", config, step=3, identity={"data": identity})
    write_json(tmp_path / "run" / "data.json", {"folders": [{"folder": str(data)}]})
    return tmp_path / "run"


@pytest.fixture
def undrawn(monkeypatch):
    """Without the figures, which take longest."""
    monkeypatch.setattr("megaresid.monitoring.figures.figures", lambda *_: iter(()))


def expected(run, ids):
    """The probe of the two first sequences of a split, whose first token begins a document."""
    idx = torch.tensor([50256, *map(int, ids)][: 2 * CONTEXT]).reshape(2, CONTEXT)
    return probe(open_saved(run).model(), idx)


def found_in(folder):
    return json.loads((folder / "findings.json").read_text())


def test_a_run_is_drawn_on_its_own_validation_tokens(run, capsys):
    inspect(run)
    folder = run / "report" / "inspect" / "step_00000003"
    found, wanted = found_in(folder), expected(run, VALIDATION)
    assert found["schema"] == 1 and found["step"] == 3 and found["sequences"] == 2 and found["context"] == CONTEXT
    assert found["of_model"] == pytest.approx(wanted.of_model)
    assert found["by_depth"].keys() == wanted.by_depth.keys()
    for quantity, places in wanted.by_depth.items():
        assert found["by_depth"][quantity] == pytest.approx(places), quantity
    (matrices,) = found["mixing"].values()
    assert np.shape(matrices["composite"]) == (4, 4)
    assert list(matrices["by_place"]) == list(wanted.by_depth["update_rms"])
    drawn = {path.name for path in folder.iterdir()}
    names = ["by_depth", "by_depth_declared", "streams", "site.mixing"]
    assert drawn == {"findings.json"} | {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["place", "read_rms", "update_rms", "update_ratio", "cosine"]
    places = {line.split()[0]: line.split()[1:] for line in lines[1:6]}
    assert float(places["01.mlp"][1]) == pytest.approx(wanted.by_depth["update_rms"]["01.mlp"], rel=1e-3)
    assert float(places["01.attention"][3]) == pytest.approx(wanted.by_depth["cosine"]["01"], rel=1e-3)
    assert len(places["00.mlp"]) == 3 and len(places["close"]) == 1
    assert lines[-1].startswith("step 3 of")


def test_what_is_there_is_not_written_over(run, tmp_path, undrawn):
    out = tmp_path / "out"
    inspect(run, out=out)
    before = (out / "findings.json").read_bytes()
    with pytest.raises(UserError, match="--out .*: it is there already"):
        inspect(run, out=out)
    assert (out / "findings.json").read_bytes() == before


def test_a_place_that_cannot_be_written_is_told(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out .*/file/out: Not a directory"):
        inspect(run, out=tmp_path / "file" / "out")


def test_a_full_disk_is_told(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", refuse)
    with pytest.raises(UserError, match="--out .*/out: No space left on device"):
        inspect(run, out=tmp_path / "out")
    assert not (tmp_path / "out" / "findings.json").exists()


@pytest.mark.parametrize("tree", [{}, {"folders": ["x"]}, {"folders": None}])
def test_a_record_of_the_data_that_names_none_is_told(tree, run):
    (run / "data.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="data.json is damaged: give a folder of shards by --data"):
        inspect(run)


def test_an_exported_folder_needs_data_and_has_its_training_tokens(run, data, tmp_path, undrawn):
    write_exported(run, "safetensors", tmp_path / "exported", None, print)
    with pytest.raises(UserError, match="give a folder of shards by --data"):
        inspect(tmp_path / "exported")
    inspect(tmp_path / "exported", data=data, out=tmp_path / "out")
    found = found_in(tmp_path / "out")
    assert found["of_model"] == pytest.approx(expected(run, TRAINING).of_model)


def test_a_step_that_is_not_kept_names_those_that_are(run):
    with pytest.raises(UserError, match="--step 4: .* has no checkpoint of it; there are those of steps 3"):
        inspect(run, step=4)


def test_the_step_of_a_checkpoint_is_taken(run, tmp_path, undrawn):
    inspect(run, step=3, out=tmp_path / "out")
    assert found_in(tmp_path / "out")["step"] == 3


def test_other_data_than_the_runs_are_refused(run, tmp_path):
    header = run / "data.json"
    other = tmp_path / "other"
    other.mkdir()
    for name in ("train_0.bin", "val_0.bin"):
        (other / name).write_bytes(pack_header(50) + bytes(100))
    adopt(other)
    header.write_text(json.dumps({"folders": [{"folder": str(other)}]}))
    with pytest.raises(UserError, match="holds other data than"):
        inspect(run)
