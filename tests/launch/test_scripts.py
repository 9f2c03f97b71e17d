"""The shell scripts: they parse, `.ci/run` calls the tests and nothing else, arguments reach the programs unchanged."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), ROOT / "launch/slurm.sbatch", ROOT / ".ci/run"])


@pytest.fixture
def checkout(tmp_path):
    """A copy of launch/ beside an "environment" that is complete and whose programs print their arguments."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch" / "environment.sh").write_text(
        f'set -euo pipefail\nmegaresid_root="{tmp_path}"\nPATH="{tmp_path}/bin:$PATH"\n'
    )
    (tmp_path / "bin").mkdir()
    for program in ("python", "deepspeed"):
        path = tmp_path / "bin" / program
        path.write_text(f'#!/bin/sh\nprintf "%s\\n" {program} "$@"\nexit 7\n')
        path.chmod(0o755)
    return tmp_path


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    checked = run("bash", "-n", script)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_ci_runs_the_tests_and_nothing_else():
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ["bash launch/test.sh"]
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize(
    "given, received",
    [
        ([], ["-m", "not full"]),
        (["--full"], []),
        (["-k", "a b", "tests/launch"], ["-m", "not full", "-k", "a b", "tests/launch"]),
        (["-x", "--full"], ["-x"]),
    ],
)
def test_test_script_chooses_the_tier(checkout, given, received):
    ran = run("bash", checkout / "launch/test.sh", *given)
    assert ran.stdout.splitlines() == ["python", "-m", "pytest", *received]
    assert ran.returncode == 7, "the exit code is pytest's"


def test_train_script_passes_arguments_and_exit_code(checkout):
    ran = run("bash", checkout / "launch/train.sh", "--module", "megaresid.train", "--run-dir", "a run")
    assert ran.stdout.splitlines() == ["deepspeed", "--module", "megaresid.train", "--run-dir", "a run"]
    assert ran.returncode == 7


def test_gpt2_medium_needs_data_and_run_directory(checkout):
    ran = run("bash", checkout / "launch/gpt2_medium.sh", "data/fineweb")
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith("usage: bash launch/gpt2_medium.sh DATA RUN_DIR")
    assert len(ran.stderr.splitlines()) == 1


def test_gpt2_medium_is_the_reference_run_with_the_callers_options_last(checkout):
    arguments = run("bash", checkout / "launch/gpt2_medium.sh", "my data", "runs/r", "--seed", "7").stdout.splitlines()
    value = dict(zip(arguments, arguments[1:]))
    assert value["--num_accelerators"] == "2" and value["--module"] == "megaresid.train"
    assert value["--preset"] == "reference" and value["--micro-batch-size"] == "32"
    assert value["--data"] == "my data" and value["--run-dir"] == "runs/r"
    assert Path(value["--deepspeed_config"]).resolve() == checkout / "ds_configs" / "h200x2.json"
    assert arguments[-2:] == ["--seed", "7"]


def python_that_says(folder, version):
    """An executable that answers a check of its version as an interpreter of ``version`` would."""
    folder.mkdir(exist_ok=True)
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        program = folder / name
        answer = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
        program.write_text(f'#!/bin/sh\nexec "{shutil.which("python3")}" -c "{answer}" "$2"\n')
        program.chmod(0o755)
    return folder


def environment_script(tmp_path):
    """environment.sh in a checkout without an environment."""
    for name in ("setup.cfg", "launch/environment.sh", "launch/constraints.txt"):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "checkout" / name)
    return tmp_path / "checkout" / "launch/environment.sh"


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"MEGARESID_PYTHON": "/nowhere/python"}, "MEGARESID_PYTHON=/nowhere/python is no Python 3.11"),
        ({"CXX": "/nowhere/c++"}, "no C++ compiler was found (/nowhere/c++)"),
    ],
)
def test_a_missing_tool_is_one_line_and_makes_nothing(tmp_path, environment, message):
    script = environment_script(tmp_path)
    ran = run("bash", "-c", f'source "{script}"; echo went on', **environment)
    assert ran.returncode == 2 and ran.stdout == ""
    assert message in ran.stderr and len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "checkout" / ".venv").exists()


def test_an_old_python_is_refused(tmp_path):
    script = environment_script(tmp_path)
    old = python_that_says(tmp_path / "old", (3, 10))
    ran = run("bash", "-c", f'source "{script}"', PATH=f"{old}:{os.environ['PATH']}")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no Python 3.11 or newer was found") and len(ran.stderr.splitlines()) == 1
