"""``python -m megaresid.doctor``: every check finds the fault that is planted for it, and none where there is none."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from doctor_findings import levels, only
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megaresid import doctor
from megaresid.checks import child, deepspeed_json, gpu, launcher, machine, operators, software, storage
from megaresid.checks.child import Child, ChildFailed
from megaresid.checks.finding import Finding, found_by
from megaresid.config import RunConfig
from megaresid.model.presets import PRESETS

ROOT = Path(__file__).parents[1]


def requirements(*lines: str) -> software.Ranges:
    return {"": [Requirement(line) for line in lines]}


def test_versions_out_of_range_and_packages_that_are_missing():
    installed = {"torch": "2.10.0", "deepspeed": "0.19.8", "numpy": None}
    ranges = requirements("torch>=2.11", "deepspeed>=0.19.8,<0.20", "numpy>=2.0")
    old, missing = [f for f in software.packages(ranges, False, installed.get) if f.level == "fault"]
    assert old.words == "torch 2.10.0 is outside >=2.11" and '"torch>=2.11"' in old.mend
    told = [f.words for f in software.packages(ranges, False, installed.get) if f.level == "ok"]
    assert len(told) == 1 and told[0].startswith("1 within"), "what is needed is not called optional"
    assert missing.words == "numpy is missing" and '"numpy>=2.0"' in missing.mend


def test_what_a_gpu_needs_is_asked_for_where_there_is_one_alone():
    ranges = {"": [], "gpu": [Requirement("triton>=3.3")]}
    assert levels(software.packages(ranges, False, {}.get)) == {"ok"}
    assert "triton is missing" in only(software.packages(ranges, True, {}.get), "fault").words
    assert "outside" in only(software.packages(ranges, False, {"triton": "3.0"}.get), "warning").words


def test_a_local_version_of_torch_is_within_the_range():
    assert levels(software.packages(requirements("torch>=2.11"), False, {"torch": "2.13.0+cu130"}.get)) == {"ok"}


def test_the_ranges_are_those_of_setup_cfg_or_where_there_is_none_of_the_installed_package(tmp_path, monkeypatch):
    python, ranges = software.required()
    assert "3.11" in python and "3.10" not in python
    assert {r.name for r in ranges[""]} >= {"torch", "deepspeed", "tiktoken"}
    assert {r.name for r in ranges["gpu"]} >= {"triton", "flash-linear-attention"}
    # As pip writes it; what an extra needs carries a marker, and a marker may be of something else.
    lines = ["torch>=2.11", 'tomli; python_version < "3"', 'pyarrow; python_version > "3"']
    lines += ['triton>=3.3; extra == "gpu"']
    monkeypatch.setattr(software.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(software.metadata, "metadata", lambda name: {"Requires-Python": ">=3.12"})
    python, ranges = software.required(tmp_path / "no setup.cfg")
    assert "3.12" in python and "3.11" not in python
    assert {extra: [r.name for r in every] for extra, every in ranges.items() if every} == {
        "": ["torch", "pyarrow"],
        "gpu": ["triton"],
    }
    assert str(ranges[""][0].specifier) == ">=2.11" and str(ranges["gpu"][0].specifier) == ">=3.3"


def test_a_python_that_is_too_old():
    assert "3.10.2" in only(software.python(SpecifierSet(">=3.11"), "3.10.2"), "fault").words
    assert levels(software.python(SpecifierSet(">=3.11"), "3.14.0b1")) == {"ok"}


def test_headers_and_a_compiler_that_are_missing_are_missed_while_nothing_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    found = list(software.compiler(False, tmp_path))
    assert [finding.level for finding in found] == ["fault", "fault"]
    assert "python3-dev" in found[0].mend and "no-such-compiler" in found[1].words
    assert levels(software.compiler(True, tmp_path)) == {"warning"}
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CXX", f"{sys.executable} -E")
    assert levels(software.compiler(False, tmp_path)) == {"ok"}


def test_a_stale_lock_is_told_and_left(tmp_path):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    found = only(operators.operators(tmp_path, False), "fault")
    assert str(lock) in found.words and f"rm {lock}" in found.mend and lock.exists()
    with open(lock):  # somebody builds
        assert "fault" not in levels(operators.operators(tmp_path, False))


def test_operators_that_are_not_built(tmp_path):
    assert "compiled_ops" in only(operators.operators(tmp_path / "nowhere", False), "warning").mend
    assert levels(operators.operators(tmp_path / "nowhere", True)) == {"ok"}
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm/deepspeed_shm_comm.so").touch()
    assert levels(operators.operators(tmp_path, False)) == {"ok"}


def python(code: str, seconds: float = 20.0) -> Child:
    return child.start([sys.executable, "-c", code], seconds)


GIVE = "from megaresid.checks.child import give; "


def test_a_child_gives_its_answer_whatever_else_it_prints():
    assert python(f"{GIVE}print('noise'); give({{'n': 1}}); print('after')").answer() == {"n": 1}
    assert python(f"{GIVE}give({{'n': 1}}); give({{'n': 2}})").answer() == {"n": 2}, "its last word"
    alone = python("")
    assert os.getsid(alone.process.pid) == alone.process.pid, "ended with those that it starts, and not with us"
    alone.end()


@pytest.mark.parametrize(
    "code, said",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        (f"{GIVE}give({{}}); raise SystemExit(3)", "exit code 3"),
        ("raise ImportError('libcuda.so.1')", "ImportError: libcuda.so.1"),
        ("pass", "it said nothing"),
    ],
)
def test_a_child_that_crashes_is_told_in_one_line(code, said):
    with pytest.raises(ChildFailed) as caught:
        python(code).answer()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_child_that_hangs_ends_with_those_that_it_started():
    reader, writer = os.pipe()
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], "
    code += f"pass_fds=[{writer}]); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], pass_fds=[writer], start_new_session=True) as process:
        os.close(writer)
        with pytest.raises(ChildFailed, match="within 2 s"):
            Child(process, None, 2.0).answer()
        assert os.read(reader, 1) == b"", "the end of file comes when nobody holds the other end any more"
    os.close(reader)


def ring(answer: str) -> Child:
    return python(GIVE + answer)


def test_ranks_that_do_not_come_together_or_add_up_wrong():
    found = only(launcher.launcher(ring("raise SystemExit('address in use')"), 2), "fault")
    assert "did not come together" in found.words and "address in use" in found.words and found.mend
    found = only(launcher.launcher(ring("give({'sum': 1.0, 'ranks': 2, 'backend': 'nccl'})"), 2), "fault")
    assert "added up to 1, where it is 3" in found.words
    found = only(launcher.launcher(ring("give({'sum': 1.0, 'ranks': 1, 'backend': 'gloo'})"), 2), "fault")
    assert "1 ranks of 2" in found.words
    found = only(launcher.launcher(ring("give({'sum': 3.0, 'ranks': 3, 'backend': 'gloo'})"), 2), "fault")
    assert "3 ranks of 2" in found.words


def test_no_launcher(monkeypatch):
    monkeypatch.setattr(launcher.shutil, "which", lambda *given, **options: None)
    with pytest.raises(ChildFailed, match="no program named deepspeed"):
        launcher.start_ranks(2, False)


def seen(**changes) -> dict:
    device = {"name": "NVIDIA H200", "architecture": "sm_90", "free": 138 * 2**30, "total": 140 * 2**30}
    answer = {"torch": "2.13.0", "cuda": "13.0", "devices": [device], "architectures": ["sm_80", "sm_90"], "why": ""}
    return answer | changes


DRIVER = gpu.Driver("570.86", ["NVIDIA H200"], {4711: 70_000})


def test_gpus_that_are_as_they_should_be():
    assert levels(gpu.gpus(seen(), DRIVER)) == {"ok"}
    assert levels(gpu.gpus(seen(devices=[], cuda=None), None)) == {"ok"}
    device = seen()["devices"][0] | {"free": 127 * 2**30}  # a context of another process, say
    assert levels(gpu.gpus(seen(devices=[device]), DRIVER)) == {"ok"}


def test_a_torch_that_does_not_fit_the_gpu_or_its_driver():
    found = only(gpu.gpus(seen(devices=[], cuda=None), DRIVER), "fault")
    assert "H200" in found.words and "built without CUDA" in found.words
    found = only(gpu.gpus(seen(devices=[], why="driver too old (found version 11040)"), DRIVER), "fault")
    assert "CUDA 13.0" in found.words and "570.86" in found.words and "driver too old" in found.words
    (found,) = gpu.gpus(seen(architectures=["sm_80"]), DRIVER)
    assert found.level == "fault"
    assert "sm_90" in found.words and "sm_80" in found.words
    assert "libcudart" in only(gpu.gpus({"error": "ImportError: libcudart.so.13"}, DRIVER), "fault").words


def test_a_gpu_that_others_use():
    device = seen()["devices"][0] | {"free": 60 * 2**30}
    found = only(gpu.gpus(seen(devices=[device]), DRIVER), "warning")
    assert "60.0 of 140.0 GiB free" in found.words and "process 4711 with 70000 MiB" in found.mend


SMI = """#!/bin/sh
case "$1" in
*driver*) echo "570.86, NVIDIA H200"; echo "a remark, that is, of three cells"; echo "570.86, NVIDIA H200" ;;
*) echo "4711, 70000"; echo "4712, [N/A]" ;;
esac
"""


def test_what_nvidia_smi_says_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    assert gpu.ask_driver() == gpu.Driver("570.86", ["NVIDIA H200"] * 2, {4711: 70_000, 4712: 0})
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpu.ask_driver() is None
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.write_text("#!/bin/sh\necho 'Failed, no devices were found'\nexit 6\n")
    assert gpu.ask_driver() is None
    program.unlink()
    assert gpu.ask_driver() is None


def test_kernels_that_are_wrong_or_crash(monkeypatch):
    answer = "give({'right': {'gla': 'chunk_gla'}, 'wrong': {'retention': 'chunk_simple_gla is wrong: use another'}})"
    monkeypatch.setattr(gpu, "start_module", lambda *given, **options: ring(answer))
    found = list(gpu.kernels())
    assert [f.subject for f in found] == ["kernel of gla", "kernel of retention"]
    assert "is wrong" in only(found, "fault").words
    monkeypatch.setattr(gpu, "start_module", lambda *given, **options: ring("import os; os.abort()"))
    assert "SIGABRT" in only(gpu.kernels(), "fault").words


def test_fewer_cores_than_threads(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    found = only(machine.cores(2, 4.0), "warning")
    assert "4 for 2 ranks of 4 threads" in found.words and "OMP_NUM_THREADS=2" in found.mend
    assert "OMP_NUM_THREADS=1 and use fewer ranks" in only(machine.cores(8, 4.0), "warning").mend
    assert only(machine.cores(4, 4.0), "warning").mend == "set OMP_NUM_THREADS=1"
    assert levels(machine.cores(1, 4.0)) == {"ok"}
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.cores_available(tmp_path / "cpu.max") == 0.5
    (tmp_path / "cpu.max").write_text("900000000 1000\n")
    assert machine.cores_available(tmp_path / "cpu.max") == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.cores_available(tmp_path / "cpu.max") == len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # of nested parallel regions: no number
    assert levels(machine.cores(2, 2.0)) == {"ok"}


def disk(monkeypatch, module, free: int) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_little_shared_memory_or_none(monkeypatch, tmp_path):
    disk(monkeypatch, machine, 64 * 2**20)
    assert "--shm-size" in only(machine.shared_memory(tmp_path), "warning").mend
    disk(monkeypatch, machine, 8 * 2**30)
    assert levels(machine.shared_memory(tmp_path)) == {"ok"}
    assert "--ipc=host" in only(machine.shared_memory(tmp_path / "nowhere"), "fault").mend


def test_a_low_limit_of_open_files():
    assert "ulimit -n" in only(machine.open_files(256), "warning").mend
    assert levels(machine.open_files(machine.resource.RLIM_INFINITY)) == {"ok"}


def test_a_run_directory_that_is_a_file_or_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "is a file" in only(storage.storage(tmp_path / "file"), "fault").words

    def refuse(probe):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(storage, "_speed", refuse)
    found = only(storage.storage(tmp_path / "runs" / "new"), "fault")
    assert "Read-only file system" in found.words and str(tmp_path) in found.words


def test_a_disk_on_which_files_cannot_be_locked(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "No locks available" in only(storage.storage(tmp_path), "fault").words
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, monkeypatch):
    size = storage.checkpoint_bytes(PRESETS["gpt2-medium"])
    # 355M parameters of 12 bytes.
    assert size == pytest.approx(354.8e6 * 12, rel=0.01)
    disk(monkeypatch, storage, size // 2)
    found = list(storage.storage(tmp_path / "new"))
    assert "GiB free" in only(found, "fault").words and "make room" in only(found, "fault").mend
    disk(monkeypatch, storage, 2 * size)
    assert "--keep-checkpoints" in only(storage.storage(tmp_path), "warning").mend
    disk(monkeypatch, storage, 4 * size)
    assert "fault" not in levels(storage.storage(tmp_path))
    assert list(tmp_path.iterdir()) == [], "what was written to measure is removed, and no folder is made"


def test_the_room_is_judged_by_the_run_that_is_there(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"schema": 1, "model": "tiny"}))
    disk(monkeypatch, storage, 2 * 2**30)
    assert "fault" not in levels(storage.storage(tmp_path))
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    with open(tmp_path / "checkpoints/step_00000001/rank_00000.safetensors", "wb") as file:
        file.truncate(3 * 2**30)
    assert "3.00" in only(storage.room(tmp_path, 2 * 2**30, RunConfig()), "fault").words
    assert levels(storage.room(tmp_path, 6 * 2**30, RunConfig())) == {"ok"}, "two more are to come, one is there"
    assert levels(storage.room(tmp_path, 6 * 2**30 - 1, RunConfig())) == {"warning"}
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in [f for f in storage.storage(tmp_path) if f.level == "fault"][0].words


def test_a_slow_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_speed", lambda probe: 2e6)
    found = [f for f in storage.storage(tmp_path) if f.subject == "disk speed"]
    assert found[0].level == "warning" and "2 MB/s" in found[0].words


def test_a_check_that_fails_itself_is_a_fault_and_the_others_are_made():
    def broken():
        yield Finding("ok", "first", "fine")
        raise RuntimeError("two\nlines")

    found = only(found_by("broken", broken), "fault")
    assert found.subject == "broken" and "RuntimeError: two lines" in found.words


def test_a_json_of_deepspeed_is_judged_by_the_options_that_agree_with_it(tmp_path):
    path = tmp_path / "ds.json"
    tree = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": "auto"}}, "gradient_clipping": 0.5}
    config = deepspeed_json.options_of(tree | {"train_micro_batch_size_per_gpu": 3, "train_batch_size": "auto"}, path)
    assert (config.optimizer.learning_rate, config.optimizer.clip) == (1e-5, 0.5)
    assert (config.batch.micro_batch_size, config.batch.global_batch_size) == (3, 3)
    assert config.optimizer.betas == RunConfig().optimizer.betas


def run(*options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "megaresid.doctor", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=400,
    )


def test_help_waits_for_no_torch():
    code = "import sys, megaresid.doctor; print({'torch', 'deepspeed', 'fla', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_command_tells_faults_apart(tmp_path):
    """One start with planted faults: a stale lock, a wrong JSON, no data set; all else of this machine is looked at."""
    lock = tmp_path / "operators/some_operator/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "ds.json").write_text('{"zero_optimisation": {}}')
    options = ("--data", str(tmp_path / "nowhere"), "--run-dir", str(tmp_path / "run"))
    options += ("--deepspeed-config", str(tmp_path / "ds.json"))
    done = run(*options, TORCH_EXTENSIONS_DIR=str(lock.parents[1]), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and done.stderr == ""
    lines = done.stdout.splitlines()
    faults = [line for line in lines if line.startswith("fault")]
    assert len(faults) == 3, done.stdout
    assert str(lock) in faults[0] and "nowhere" in faults[1] and "did you mean 'zero_optimization'" in faults[2]
    assert lines[-1].startswith("3 faults, ") and not (tmp_path / "run").exists() and lock.exists()
    assert any(line.startswith("ok       launcher: ") and "all-reduce" in line for line in lines)


def test_the_table_of_a_terminal_shows_brackets_as_they_are():
    found = Finding("fault", "data [x]", "[bold]broken[/bold]", "mend [it]")
    table = doctor._table([found])
    console = doctor.Console(width=200)
    with console.capture() as captured:
        console.print(table)
    assert "[bold]broken[/bold]" in captured.get() and "mend [it]" in captured.get()
