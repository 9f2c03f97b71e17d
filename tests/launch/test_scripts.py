"""The shell scripts: they parse, `.ci/run` calls the tests and nothing else, arguments reach the programs unchanged."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from data_prep.job import Job
from data_prep.sources.source import Share

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci/run"])
PYTHON = {"MEGARESID_PYTHON": sys.executable}  # a real one, where the environment's only records its calls

# Stands for every program of the environment: writes what it was called with to `calls`, one argument a line, and
# does what the scripts wait for: makes the data set, counts two GPUs, finds a port.
PROGRAM = """#!/bin/sh
printf '%s\\n' "$(basename "$0")" "$@" --- >> calls
case "$*" in
*--out*) for folder; do :; done; mkdir -p "$folder"; touch "$folder/manifest.json" ;;
*device_count*) echo 2 ;;
*socket*) echo 12345 ;;
esac
exit ${EXIT_CODE:-0}
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of launch/ beside an environment that is complete and whose programs only record their calls."""
    root = tmp_path / "check out"
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copy(ROOT / "setup.cfg", root)
    (root / ".venv/bin").mkdir(parents=True)
    sums = [run("cksum", stdin=open(root / file)).stdout for file in ("setup.cfg", "launch/constraints.txt")]
    (root / ".venv/megaresid-complete").write_text(
        f"{''.join(sums)}{root}/.venv\nsystem torch: 0\nextras: dev,gpu\n"
    )
    for program in ("python", "deepspeed"):
        write_program(root / ".venv/bin" / program, PROGRAM)
    write_program(root / ".venv/bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    for name in ("MEGARESID_SYSTEM_TORCH", "MEGARESID_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    # has_gpu is asked before the environment is activated
    monkeypatch.setenv("PATH", f"{root}/.venv/bin:{os.environ['PATH']}")
    return root


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def calls(checkout):
    """What the programs were called with, in order."""
    text = (checkout / "calls").read_text() if (checkout / "calls").exists() else ""
    return [call.splitlines() for call in text.split("---\n") if call]


def run(*command, stdin=None, **environment):
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, stdin=stdin, env=os.environ | environment, timeout=60, **output)


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
    ran = run("bash", "launch/test.sh", *given, EXIT_CODE="5")
    assert calls(checkout) == [["python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *received]]
    assert ran.returncode == 5, "the exit code is pytest's, 5 where no test was collected"


def test_train_script_passes_arguments_and_exit_code(checkout):
    ran = run("bash", "launch/train.sh", "--module", "megaresid.train", "--run-dir", "a run", EXIT_CODE="7")
    supervise = str(checkout / "launch/supervise.py")
    assert calls(checkout) == [["python", supervise, "--module", "megaresid.train", "--run-dir", "a run"]]
    assert ran.returncode == 7


def test_gpt2_medium_needs_data_and_run_directory(checkout):
    ran = run("bash", "launch/gpt2_medium.sh", "data/fineweb")
    assert ran.returncode == 2 and calls(checkout) == []
    assert ran.stderr.startswith("usage: bash launch/gpt2_medium.sh DATA RUN_DIR")
    assert len(ran.stderr.splitlines()) == 1


def test_gpt2_medium_is_the_reference_run_with_the_callers_options_last(checkout):
    run("bash", "launch/gpt2_medium.sh", "my data", "runs/r", "--seed", "7")
    [[program, *arguments]] = calls(checkout)
    assert (program, arguments.pop(0)) == ("python", str(checkout / "launch/supervise.py"))
    value = dict(zip(arguments, arguments[1:]))
    assert value["--num_accelerators"] == "2" and value["--module"] == "megaresid.train"
    assert value["--preset"] == "reference" and value["--micro-batch-size"] == "32"
    assert value["--data"] == "my data" and value["--run-dir"] == "runs/r"
    assert Path(value["--deepspeed_config"]).resolve() == checkout / "ds_configs" / "h200x2.json"
    assert arguments[-2:] == ["--seed", "7"]


def training_options(checkout):
    [call] = [call for call in calls(checkout) if call[0] == "deepspeed"]
    return dict(zip(call, call[1:]))


def test_quickstart_makes_the_data_trains_samples_and_sums_up(checkout):
    assert run("bash", "launch/quickstart.sh").returncode == 0
    programs = [call for call in calls(checkout) if "-c" not in call]
    modules = [call[2] if call[0] == "python" else call[0] for call in programs]
    assert modules == ["data_prep", "deepspeed", "megaresid.generate", "megaresid.summary"]
    assert (checkout / "data/python-docs/manifest.json").exists()
    assert not (checkout / "data/python-docs.partial").exists()
    options = training_options(checkout)
    assert options["--data"] == "data/python-docs" and options["--run-dir"] == "runs/quickstart"
    assert options["--deepspeed_config"] == "ds_configs/cpu.json" and options["--master_port"] == "12345"


def test_quickstart_overwrites_no_run_and_checks_the_data_it_finds(checkout):
    for run_dir in ("quickstart", "quickstart-2"):
        (checkout / "runs" / run_dir).mkdir(parents=True)
    (checkout / "data/python-docs").mkdir(parents=True)
    (checkout / "data/python-docs/manifest.json").touch()
    assert run("bash", "launch/quickstart.sh").returncode == 0
    assert calls(checkout)[0] == ["python", "-m", "data_prep", "verify", "data/python-docs"]
    assert training_options(checkout)["--run-dir"] == "runs/quickstart-3"
    assert {call[call.index("--run") + 1] for call in calls(checkout) if "--run" in call} == {"runs/quickstart-3"}


def test_quickstart_goes_on_after_an_interrupted_tokenization(checkout):
    (checkout / "data/python-docs.partial").mkdir(parents=True)
    (checkout / "data/python-docs.partial/train_000000.bin").touch()
    assert run("bash", "launch/quickstart.sh").returncode == 0
    assert [path.name for path in (checkout / "data/python-docs").iterdir()] == ["manifest.json"]


def test_quickstart_leaves_a_folder_alone_that_is_no_data_set(checkout):
    (checkout / "data/python-docs").mkdir(parents=True)
    (checkout / "data/python-docs/notes.txt").touch()
    ran = run("bash", "launch/quickstart.sh")
    assert ran.returncode == 2 and calls(checkout) == []
    assert ran.stderr == "error: data/python-docs is no data set (it has no manifest.json): delete it and start again\n"


def test_quickstart_stops_where_training_fails(checkout):
    (checkout / "data/python-docs").mkdir(parents=True)
    (checkout / "data/python-docs/manifest.json").touch()
    write_program(checkout / ".venv/bin/deepspeed", "#!/bin/sh\nexit 3\n")
    assert run("bash", "launch/quickstart.sh").returncode == 3
    assert [call[2] for call in calls(checkout) if "-m" in call] == ["data_prep"], "no sample and no summary"


def test_quickstart_uses_every_gpu(checkout):
    """Also where the second one is told of when the first has been read."""
    write_program(checkout / ".venv/bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: H200'\nsleep 0.1\necho 'GPU 1: H200'\n")
    assert run("bash", "launch/quickstart.sh").returncode == 0
    options = training_options(checkout)
    assert options["--num_accelerators"] == "2" and options["--deepspeed_config"] == "ds_configs/h200x2.json"
    assert int(options["--micro-batch-size"]) * 2 == int(options["--global-batch-size"])


NO_INDEX = """#!/bin/sh
case "$*" in
*" install "*dev,gpu*) echo "ERROR: no index" >&2; exit 1 ;;
esac
"""


@pytest.mark.parametrize("reason", ["a GPU", "MEGARESID_GPU=1"])
def test_a_gpu_extra_that_cannot_be_added_leaves_the_environment_complete_without(checkout, reason):
    stamp = checkout / ".venv/megaresid-complete"
    stamp.write_text(stamp.read_text().replace("dev,gpu", "dev"))
    complete = stamp.read_text()
    write_program(checkout / ".venv/bin/python", NO_INDEX)
    if reason == "a GPU":
        write_program(checkout / ".venv/bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: H200'\n")
    forced = {"MEGARESID_GPU": "1"} if reason == "MEGARESID_GPU=1" else {}
    ran = run("bash", "-c", "source launch/environment.sh; echo went on", **PYTHON, **forced)
    assert ran.returncode == 2 and "Installing megaresid[dev,gpu]" in ran.stdout and "went on" not in ran.stdout
    assert stamp.read_text() == complete
    (checkout / ".venv/bin/nvidia-smi").unlink()
    assert run("bash", "-c", "source launch/environment.sh; echo went on").stdout == "went on\n"


def test_an_environment_out_of_date_is_not_complete_and_keeps_its_gpu_extra(checkout):
    """The first attempt fails; the second, where no GPU is, still installs the extra and renews the stamp."""
    stamp = checkout / ".venv/megaresid-complete"
    before = (checkout / "setup.cfg").read_text()
    complete = stamp.read_text()
    (checkout / "setup.cfg").write_text(before + "# changed\n")
    write_program(checkout / ".venv/bin/python", NO_INDEX)
    assert run("bash", "-c", "source launch/environment.sh", **PYTHON).returncode == 2
    (checkout / "setup.cfg").write_text(before)
    write_program(checkout / ".venv/bin/python", PROGRAM)
    ran = run("bash", "-c", "source launch/environment.sh; echo went on", **PYTHON)
    assert "Installing megaresid[dev,gpu]" in ran.stdout, "what was half replaced is installed again"
    assert ran.stdout.endswith("went on\n") and stamp.read_text() == complete


@pytest.mark.parametrize(
    "version, fits",
    [("2.10.0", False), ("2.11.0a0+g1.nv26", False), ("2.11.0+cu128", True), ("2.12.0a0+g1.nv26", True)],
)
def test_the_sites_torch_must_be_one_that_pip_takes(checkout, tmp_path, version, fits):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/torch.py").write_text(f"__version__ = {version!r}\n")
    stamp = checkout / ".venv/megaresid-complete"
    stamp.write_text(stamp.read_text().replace("system torch: 0", "system torch: 1").replace("dev,gpu", "dev"))
    # Runs Python for the check alone: no package is installed.
    python = f'#!/bin/sh\ncase "$1" in -) exec "{sys.executable}" - ;; esac\n'
    write_program(checkout / ".venv/bin/python", python)
    site = {"PYTHONPATH": str(tmp_path / "site"), "MEGARESID_GPU": "1"}
    ran = run("bash", "-c", "source launch/environment.sh; echo went on", **PYTHON, **site)
    if fits:
        assert ran.returncode == 0 and f"Using the site's torch {version}\n" in ran.stdout
        assert f"torch=={version}" in (checkout / ".venv/constraints.txt").read_text().splitlines()
    else:
        assert ran.returncode == 2 and "went on" not in ran.stdout
        assert f"its torch is {version}: the release 2.11 or newer is needed" in ran.stderr
        assert len(ran.stderr.splitlines()) == 1


SCONTROL = """#!/bin/sh
case "$1" in
show) echo node-1; sleep 0.1; echo node-2 ;; # one by one, as of many machines
*) printf '%s\\n' scontrol "$@" --- >> calls ;;
esac
"""


def slurm_job(checkout):
    write_program(checkout / ".venv/bin/scontrol", SCONTROL)
    return {
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "42",
        "SLURM_CPUS_PER_TASK": "16",
    }


@pytest.mark.parametrize(
    "warned, code, requeued",
    [(True, 75, True), (True, 137, True), (False, 75, False), (True, 0, False), (True, 2, False), (True, 76, False)],
)
def test_a_slurm_job_that_runs_out_of_time_stops_its_steps_and_is_requeued(checkout, warned, code, requeued):
    """srun ends when its step is sent TERM; a job that its owner cancels has not been warned."""
    job = slurm_job(checkout) | {"SRUN_CODE": str(code)}
    write_program(checkout / ".venv/bin/scancel", PROGRAM.replace("exit ${EXIT_CODE:-0}", "echo stop > step"))
    write_program(checkout / ".venv/bin/srun", "#!/bin/sh\necho runs\nread -r word < step\nexit $SRUN_CODE\n")
    os.mkfifo(checkout / "step")
    command = ["bash", "launch/slurm.sbatch", "my data", "a run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | job) as batch:
        assert batch.stdout.readline() == "runs\n"
        if warned:
            batch.send_signal(signal.SIGUSR1)
        else:
            (checkout / "step").write_text("stop\n")
        assert batch.wait(60) == code
    told = [["scancel", "--signal=TERM", "42"]] if warned else []
    assert calls(checkout) == told + ([["scontrol", "requeue", "42"]] if requeued else [])


def test_slurm_passes_the_cores_on_to_each_machine(checkout):
    write_program(checkout / ".venv/bin/srun", PROGRAM)
    job = slurm_job(checkout)
    assert run("bash", "launch/slurm.sbatch", "my data", "a run", "--seed", "7", **job).returncode == 0
    [[program, *arguments]] = calls(checkout)
    launcher, training = arguments[: arguments.index("torchrun")], arguments[arguments.index("torchrun") :]
    assert program == "srun" and launcher[:3] == ["--kill-on-bad-exit", "--cpus-per-task", "16"]
    assert launcher[3:] == ["bash", str(checkout / "launch/train.sh")], "each machine's ranks are told of signals"
    value = dict(zip(training, training[1:]))
    assert value["--nnodes"] == "2" and value["--nproc-per-node"] == "2"
    assert value["--rdzv-endpoint"] == "node-1:29500" and value["-m"] == "megaresid.train"
    assert value["--data"] == "my data" and value["--run-dir"] == "a run" and training[-2:] == ["--seed", "7"]
    assert value["--resume"] == "auto"


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


@pytest.mark.full
def test_a_failed_installation_says_why_and_is_taken_up_again(tmp_path):
    """pip finds no package at all: one line of its own error, one of ours, and the environment is not complete."""
    script = environment_script(tmp_path)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    command = f'source "{script}"; echo went on'
    for expected in ("Making .venv with", "Making .venv anew with"):
        ran = run("bash", "-c", command, **offline)
        assert ran.returncode == 2
        assert expected in ran.stdout and "went on" not in ran.stdout
        assert "ERROR: " in ran.stderr and "torch==2.13.0" in ran.stderr
        assert ran.stderr.splitlines()[-1].startswith("error: pip failed: the whole output is in ")
        assert not (tmp_path / "checkout/.venv/megaresid-complete").exists()


def test_slurm_array_makes_shares_and_a_job_joins_them(checkout):
    write_program(checkout / ".venv/bin/srun", PROGRAM)
    job = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_CPUS_PER_TASK": "16"}
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}
    script = "launch/data_prep.sbatch"
    assert run("bash", script, "my data/", "--revision", "a commit", **job, **array).returncode == 0
    for number in (1, 2, 3):
        (checkout / f"my data-shares/{number}-of-3").mkdir(parents=True, exist_ok=True)
    assert run("bash", script, "my data", **job).returncode == 0
    share, merge = calls(checkout)
    assert share[:6] == ["srun", "--cpus-per-task", "16", "python", "-m", "data_prep"]
    options = tyro.cli(Job, args=share[6:])
    assert (options.source, options.revision, options.resume) == ("fineweb", "a commit", True)
    assert (options.out, options.share) == (Path("my data-shares/2-of-3"), Share(2, 3))
    shares = [f"my data-shares/{number}-of-3" for number in (1, 2, 3)]
    assert merge == [*share[:6], "merge", *shares, "--out", "my data"]


def test_slurm_array_without_a_folder(checkout):
    ran = run("bash", "launch/data_prep.sbatch", SLURM_SUBMIT_DIR=str(checkout))
    assert ran.returncode == 2 and "usage: sbatch" in ran.stderr and calls(checkout) == []
