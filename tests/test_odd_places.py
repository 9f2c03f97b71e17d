"""A run in places that are not as usual: blanks and letters of other scripts, relative paths, a plain C locale, a data
folder that cannot be written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.adopt import adopt
from megaresid.data.shards import pack_header

OPTIONS = ["--model", "tiny", "--layers", "1", "--width", "16", "--heads", "2", "--context", "8", "--steps", "2"]
OPTIONS += ["--global-batch-size", "2", "--log-interval", "1", "--eval", "validation@end", "--validation-tokens", "16"]
OPTIONS += ["--run-dir", "runs \u00e9/\u65e5\u672c \U0001f40b", "--data", "../my data"]
OPTIONS += ["--deepspeed-config", "d s.json"]


@pytest.fixture
def place(tmp_path) -> Path:
    """Where the command is started; the data lie beside it, for reading alone."""
    data, place = tmp_path / "my data", tmp_path / "started here"
    data.mkdir()
    place.mkdir()
    for name in ("train_0.bin", "val_0.bin"):
        ids = [50256, *range(99)]
        (data / name).write_bytes(pack_header(len(ids)) + b"".join(token.to_bytes(2, "little") for token in ids))
    adopt(data)
    for path in (*data.iterdir(), data):
        path.chmod(path.stat().st_mode & 0o555)
    optimizer = {"type": "AdamW", "params": {"torch_adam": True}}
    (place / "d s.json").write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": 1}}))
    yield place
    data.chmod(0o755)


@pytest.mark.full
def test_a_run_is_trained_resumed_and_summed_up_there(place):
    """Root may write anywhere: what shows that nothing was is that the data folder is as it was."""
    data = place.parent / "my data"
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in data.iterdir()}
    # Python goes into UTF-8 mode by itself there. Kept out of it, torch cannot read its own templates, nor TensorBoard
    # write to this folder: that such a run cannot be is theirs to mend.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHON"))}
    environment |= {"LANG": "C", "LC_ALL": "C", "DS_ACCELERATOR": "cpu"}
    code = "import sys; from megaresid.train import main; main(sys.argv[1:])"
    run = place / "runs \u00e9/\u65e5\u672c \U0001f40b"

    def start(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", code, *OPTIONS, *options]
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=600)

    done = start()
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000002"]
    done = start("--resume", "auto")
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    command = [sys.executable, "-m", "megaresid.summary", "--run", str(run.relative_to(place))]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"validation loss" in done.stdout
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in data.iterdir()} == before
