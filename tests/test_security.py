"""What others wrote runs no code, fills no memory and writes nowhere else; secrets stay where they are."""

import ast
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from hub_server import Fault, HubServer, send_library_to
from made_runs import configuration, made_run

import megaresid
from data_prep.__main__ import main as data_prep
from data_prep.sources import hub_repository
from megaresid.data.manifest import load_manifest
from megaresid.errors import UserError
from megaresid.export import export
from megaresid.redaction import redacted, without_secrets
from megaresid.saved_run import open_saved
from megaresid.training.checkpoint_format import read_parameters
from megaresid.training.run_dir import RunDirectory, check_usable, environment

ROOT = Path(__file__).parents[1]
SOURCES = [*ROOT.glob("megaresid/**/*.py"), *ROOT.glob("data_prep/**/*.py"), *ROOT.glob("launch/**/*.py")]

EXECUTES = re.compile(
    r"(.*\.)?(pickle|cPickle|_pickle|dill|cloudpickle|joblib|marshal|shelve)(\..*)?|torch(\.\w+)*\.(load|save)"
    r"|(np|numpy)\.(load|loadtxt|genfromtxt)|yaml\.(load|load_all|unsafe_load|full_load)|(.*\.)?load_yaml"
    r"|eval|exec|compile|__import__|(.*\.)?import_module|os\.(system|popen)|(.*\.)?(unsafe_load|read_pickle)"
)
ALLOWED = {
    ("megaresid/spec.py", "importlib.import_module"): "the package's own files, and module:Class of the user's",
    ("megaresid/evaluation/chosen.py", "importlib.import_module"): "module:function of the user's --eval",
    ("megaresid/attention/kernels/calls.py", "importlib.import_module"): "a kernel that the code names",
    ("megaresid/attention/fla_layer.py", "importlib.import_module"): "fla.layers",
    ("megaresid/evaluation/offline_tasks.py", "load_yaml"): "a task's file inside the installed library",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def executed(source: str) -> set[str]:
    """What a file calls or imports of all that can execute what it reads, however it is imported."""
    tree, aliases, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(f"{node.module}.{alias.name}", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        aliases |= {short: full for full, short in names}
        found |= {full for full, _ in names if re.fullmatch(EXECUTES, full) and "import_module" not in full}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            first, dot, rest = name.partition(".")
            for written in (name, aliases.get(first, first) + dot + rest):
                if re.fullmatch(EXECUTES, written):
                    found.add(name)
            if any(
                k.arg == "shell" and not (isinstance(k.value, ast.Constant) and not k.value.value)
                for k in node.keywords
            ):
                found.add(f"{name}(shell)")
            if any(k.arg in ("allow_pickle", "trust_remote_code") for k in node.keywords):
                found.add(f"{name}(allows)")
    return found


def test_no_source_file_calls_what_can_execute_what_it_reads():
    assert len(SOURCES) > 150
    for path in SOURCES:
        place = str(path.relative_to(ROOT))
        for name in executed(path.read_text()):
            short = name.removeprefix("lm_eval.tasks._yaml_loader.")
            assert (place, short) in ALLOWED, f"{place} uses {name}"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "import torch\ntorch.serialization.load('x')",
        "import pickle",
        "from pickle import loads",
        "import numpy as np\nnp.load('x')",
        "import numpy\nnumpy.memmap('x', allow_pickle=True)",
        "eval('1')",
        "exec('1')",
        "import yaml\nyaml.load(x)",
        "import os\nos.system('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "from importlib import import_module\nimport_module(x)",
        "import pandas as pd\npd.read_pickle(x)",
        "from datasets import load_dataset\nload_dataset('x', trust_remote_code=True)",
    ],
)
def test_the_walk_sees_each_way_of_executing(source):
    assert executed(source)


def test_the_walk_takes_what_is_harmless():
    harmless = "import re, torch\nre.compile('x')\nmodel.eval()\ntorch.compile(m)\njson.loads(x)\nnp.fromfile(x)"
    assert not executed(harmless)


class TouchesAFile:
    """What a pickle can do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_the_place_of_a_checkpoints_file_is_refused_unread(tmp_path):
    """With its size and hash in the completion record, as who can write the one can write the other."""
    made_run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    file = checkpoint / "rank_00001.safetensors"
    torch.save(TouchesAFile(tmp_path / "executed"), file)
    record(checkpoint, file.name)
    with pytest.raises(UserError, match="rank_00001.safetensors"):
        open_saved(tmp_path / "run").model()
    assert not (tmp_path / "executed").exists()


def record(checkpoint: Path, name: str) -> None:
    content = (checkpoint / name).read_bytes()
    marker = json.loads((checkpoint / "complete.json").read_text())
    marker["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "complete.json").write_text(json.dumps(marker))


NAMES = ["../outside.bin", "/etc/passwd", "a/b.bin", "..", ".", "", ".hidden", "a\\b", "a\nb", "a\0b", "C:b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_nothing_outside_its_folder(tmp_path, small_data, name):
    tree = json.loads((small_data / "manifest.json").read_text())
    tree["content"]["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="is not a plain file name"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_completion_record_names_nothing_outside_its_folder(tmp_path, name):
    made_run(tmp_path / "run")
    marker = tmp_path / "run" / "checkpoints" / "step_00000003" / "complete.json"
    tree = json.loads(marker.read_text())
    tree["files"][name] = tree["files"].pop("rank_00001.safetensors")
    marker.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="complete.json: it does not list|there is no complete checkpoint"):
        open_saved(tmp_path / "run").model()


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    rows = [json.dumps({"text": f"Line {n} of a text about the number {n * n}. " * 9}) for n in range(40)]
    (folder / "text.jsonl").write_text("\n".join(rows))
    data_prep(
        ["--source", "jsonl", "--input", str(folder / "text.jsonl"), "--out", str(folder / "data")]
        + ["--validation-fraction", "0.2"]
    )
    return folder / "data"


LINKS = [".lock", "metrics.jsonl", "config.json.partial", "checkpoints", "checkpoints/step_00000009", "forensics"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("exists", [True, False], ids=["there", "nowhere"])
def test_a_run_directory_with_a_link_out_of_it_is_refused(tmp_path, name, exists):
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / name).parent.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    if exists:
        outside.write_text("mine")
    (run / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{re.escape(name)} is a link out of it"):
        check_usable(run, resuming=True)
    assert outside.exists() == exists and (not exists or outside.read_text() == "mine")


def test_a_lock_that_is_a_link_out_of_a_new_run_directory_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(UserError, match=".lock is a link out of it"):
        check_usable(tmp_path / "run", resuming=False)


def test_links_inside_and_to_a_run_directory_are_taken(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "newest").symlink_to(run / "checkpoints")
    (tmp_path / "link").symlink_to(run)
    check_usable(run, resuming=True)
    check_usable(tmp_path / "link", resuming=True)
    (run / "round").symlink_to(run / "round")
    check_usable(run, resuming=True)


OWN_CLASS = """
from pathlib import Path
from megaresid.residual.vanilla import Vanilla
Path({executed!r}).touch()

class Own(Vanilla):
    pass

def measure(engine):
    return {{}}
"""


def write_own(folder: Path, executed: Path) -> None:
    for name in ("own_module.py", "own_package/__init__.py", "own_package/inner.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(OWN_CLASS.format(executed=str(executed)))


@pytest.fixture
def users_path(monkeypatch):
    """Adds a folder to where modules are found; forgets what was imported."""
    yield monkeypatch.syspath_prepend
    for name in [name for name in sys.modules if name.split(".")[0] in ("own_module", "own_package")]:
        del sys.modules[name]


@pytest.mark.parametrize("module", ["own_module", "own_package", "own_package.inner"])
@pytest.mark.parametrize("exported", [False, True], ids=["run", "exported"])
def test_a_module_beside_what_is_loaded_is_not_executed(tmp_path, monkeypatch, users_path, module, exported):
    """As it would be where the loaded folder is the current one: Python looks there first."""
    folder = tmp_path / "theirs"
    made_run(folder)
    name = "config.json"
    if exported:
        export(folder, "safetensors", tmp_path / "exported")
        folder, name = tmp_path / "exported", "megaresid.json"
    tree = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(tree | {"residual": f"{module}:Own"}))
    write_own(folder, tmp_path / "executed")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for place in (str(folder), "", str(tmp_path / "link")):
        with monkeypatch.context() as here:
            here.syspath_prepend(place)
            for path in (folder, Path(".").resolve(), tmp_path / "link"):
                with pytest.raises(UserError, match="inside what is being loaded, whose code is not executed"):
                    megaresid.load(path)
    assert not (tmp_path / "executed").exists()


def test_a_module_of_ones_own_is_executed_from_where_it_is(tmp_path, users_path):
    """The guard is not what refuses it: the same class, from a folder on PYTHONPATH, is taken."""
    write_own(tmp_path / "mine", tmp_path / "executed")
    users_path(str(tmp_path / "mine"))
    made_run(tmp_path / "run", configuration(residual="own_module:Own"))
    (tmp_path / "executed").unlink()
    assert megaresid.load(tmp_path / "run") is not None
    del sys.modules["own_module"]
    megaresid.load(tmp_path / "run")
    assert (tmp_path / "executed").exists()


def test_reading_a_run_imports_no_function_of_its_evaluations(tmp_path, users_path):
    write_own(tmp_path / "mine", tmp_path / "executed")
    users_path(str(tmp_path / "mine"))
    made_run(tmp_path / "run", configuration(eval="own_module:measure@1"))
    open_saved(tmp_path / "run").model()
    assert not (tmp_path / "executed").exists()


def peak_bytes() -> int:
    """VmHWM, reset before."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024


def in_header(**changes):
    def damage(checkpoint: Path) -> None:
        tree = json.loads((checkpoint / "checkpoint.json").read_text())
        (checkpoint / "checkpoint.json").write_text(json.dumps(tree | changes))
        record(checkpoint, "checkpoint.json")

    return damage


def header_text(text: str):
    def damage(checkpoint: Path) -> None:
        (checkpoint / "checkpoint.json").write_text(text)
        record(checkpoint, "checkpoint.json")

    return damage


def tensors_file(content: bytes):
    def damage(checkpoint: Path) -> None:
        (checkpoint / "rank_00000.safetensors").write_bytes(content)
        record(checkpoint, "rank_00000.safetensors")

    return damage


def config_key(**changes):
    def damage(checkpoint: Path) -> None:
        config = checkpoint.parents[1] / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))

    return damage


def safetensors(header: dict | bytes, length: int | None = None, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


HUGE = 10**15
BOMBS = {
    "shape": in_header(parameters={"embed.tokens.weight": [HUGE, HUGE]}),
    "one huge parameter": in_header(parameters={"head.norm.weight": [2**62]}),
    "negative shape": in_header(parameters={"head.norm.weight": [-1]}),
    "ranks": in_header(world_size=HUGE),
    "digits": header_text('{"step": ' + "9" * 10_000 + "}"),
    "nested": header_text("[" * 200_000),
    "nested objects": header_text('{"a":' * 200_000),
    "tensors header length": tensors_file(safetensors({}, length=2**62)),
    "tensors header beyond the file": tensors_file(safetensors({}, length=90_000_000)),
    "tensors shape": tensors_file(
        safetensors({"parameter:x": {"dtype": "F32", "shape": [HUGE, HUGE], "data_offsets": [0, 4]}}, data=bytes(4))
    ),
    "tensors offsets": tensors_file(
        safetensors({"parameter:x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}, data=bytes(4))
    ),
    "tensors nested": tensors_file(safetensors(b'{"a":' + b"[" * 500_000)),
    "runs": tensors_file(safetensors({"__metadata__": {"runs": '{"x": [' + "9" * 5000 + ", 1]}"}})),
    "runs nested": tensors_file(safetensors({"__metadata__": {"runs": "[" * 200_000}})),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_huge_and_deep_content_of_a_checkpoint_is_one_line_and_no_memory(tmp_path, bomb):
    made_run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000003"
    open_saved(tmp_path / "run").model()
    BOMBS[bomb](checkpoint)
    before = peak_bytes()
    for read in (lambda: open_saved(tmp_path / "run").model(), lambda: read_parameters(checkpoint)):
        with pytest.raises(UserError) as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 2000
    assert peak_bytes() - before < 64 * 2**20


TOKEN = "hf_" + "S3cretOfATest" * 2
KEY = "k3y-of-a-test-that-nobody-may-see"


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("COMET_API_KEY", KEY)


def test_secrets_are_taken_out_of_texts_and_trees(secrets, monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    text = f"abc {TOKEN} {KEY} https://user:{'p' * 9}@host/x hf_{'A' * 34} hf_home tokens_per_step 12"
    assert without_secrets(text) == (
        "abc (HF_TOKEN) (COMET_API_KEY) https://(login)@host/x (token) hf_home tokens_per_step 12"
    )
    tree = {
        "comet": {"api_key": "one-nobody-knows", "project": "p"},
        "command": ["--x", TOKEN],
        "tokens": 3,
        "key": "seed",
    }
    assert redacted(tree) == {
        "comet": {"api_key": "(api_key)", "project": "p"},
        "command": ["--x", "(HF_TOKEN)"],
        "tokens": 3,
        "key": "seed",
    }
    assert redacted(configuration().flat()) == configuration().flat()


def test_the_files_of_a_run_hold_no_secret(tmp_path, secrets, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--eval-data", f"https://user:{KEY}@host/x", f"--token={TOKEN}"])
    directory = RunDirectory(tmp_path)
    directory.write("environment.json", environment())
    directory.write("ds_config.json", {"comet": {"enabled": True, "api_key": "one-nobody-knows"}})
    written = "".join(file.read_text() for file in tmp_path.glob("*.json"))
    assert "--eval-data" in written and "host/x" in written
    for secret in (TOKEN, KEY, "one-nobody-knows"):
        assert secret not in written


def grep(folder: Path, *secrets: str) -> list[Path]:
    """The files, their names included, with one of them."""
    found = []
    for path in folder.rglob("*"):
        content = str(path.relative_to(folder)).encode() + (path.read_bytes() if path.is_file() else b"")
        found += [path for secret in secrets if secret.encode() in content]
    return found


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_a_failed_download_tells_no_token(tmp_path, capsys, monkeypatch, status):
    """The server sees the token, and nothing that is printed or written does."""
    monkeypatch.setattr(hub_repository.time, "sleep", lambda seconds: None)
    with HubServer() as hub:
        send_library_to(hub.url, tmp_path, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.faults.append(Fault("GET", "", status, times=1000))
        hub.faults.append(Fault("HEAD", "", status, times=1000))
        with pytest.raises(SystemExit) as caught:
            data_prep(["--source", "hub", "--dataset", "some/words", "--out", str(tmp_path / "out")])
        assert caught.value.code == 2
        assert f"Bearer {TOKEN}" in hub.tokens
    told = capsys.readouterr()
    assert told.err.count("error: ") == 1 and "some/words" in told.err
    assert TOKEN not in told.out + told.err
    assert not grep(tmp_path, TOKEN)


def test_an_error_that_names_a_secret_is_told_without_it(secrets, capsys):
    with pytest.raises(SystemExit):
        data_prep(["--source", "jsonl", "--input", f"/nowhere/{TOKEN}.jsonl", "--out", f"/nowhere/{KEY}"])
    told = capsys.readouterr()
    assert "error: " in told.err and "(HF_TOKEN)" in told.err and TOKEN not in told.err + told.out
