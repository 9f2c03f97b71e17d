"""The supervisor with launchers and ranks that train nothing and start in no time: who is told what, who is left."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from supervised_runs import ROOT, Started, family, left_of, living

from megaresid.training.supervisor import Report, read_reports

SUPERVISE = ROOT / "launch/supervise.py"
RANK = """
import os, signal, sys, time
from megaresid.training.signals import Wishes
from megaresid.training.supervisor import Report, die_with_launcher

rank, how = int(os.environ["RANK"]), sys.argv[1].split(",")
how = how[min(rank, len(how) - 1)]


def tell(line):
    os.write(1, f"{line}\\n".encode())  # at once: of an unbuffered print, the ranks' lines mingle


die_with_launcher()
wishes, step = Wishes(), 0
os.environ["WORLD_SIZE"] = "1"
with wishes.listening():
    report = Report()
    with report.of_the_end():
        while not wishes._stop or how == "deaf":
            if step == 3 and how == "lingers":
                report.ends(0)
                time.sleep(600)
            step += 1
            report.at(step)
            if step == 3:
                tell(f"rank {rank} is {os.getpid()}")
            if wishes._save:
                wishes._save = False
                tell(f"rank {rank} saves")
            if step == 3 and how == "fails":
                raise RuntimeError("no luck")
            if step == 3 and how.isdecimal():
                sys.exit(int(how))
            time.sleep(0.01)
    report.ends(75)
"""
# Where a rank that does not end by itself is to be ended.
SHORT_GRACE = {"MEGARESID_GRACE_SECONDS": "0.5"}
WRITER = """
import os, sys
os.environ["MEGARESID_SUPERVISOR"] = sys.argv[1]
from megaresid.training.supervisor import Report

report, step = Report(), 0
print("writes", flush=True)
while os.getppid() == int(sys.argv[2]):
    step += 1
    report.at(step if step % 2 else 10**9)  # longer and shorter: halves of both are no JSON
"""
# As DeepSpeed's launcher: two processes one above the other, the ranks below; signals that it gets are its end.
LAUNCHER = """
import os, subprocess, sys, time
if "below" not in sys.argv:
    sys.exit(max(0, subprocess.call([sys.executable, *sys.argv, "below"])))
command = [sys.executable, *sys.argv[1:]]
os.write(1, f"launcher is {os.getpid()} below {os.getppid()}\\n".encode())
ranks = [subprocess.Popen(command, env={**os.environ, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]
codes = [rank.wait() for rank in ranks]
sys.exit(max(codes))
"""


@pytest.fixture
def launch(tmp_path):
    """``launch(how, *options)``: two ranks that behave so, each ready at step 3."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK)

    def start(how, *options, **environment):
        command = ["python", tmp_path / "launcher.py", tmp_path / "rank.py", how, *options]
        # The grace lets the second rank end by itself once the first one has, however busy the machine is.
        fast = {"MEGARESID_RESTART_SECONDS": "0.05", "MEGARESID_GRACE_SECONDS": "120", **environment}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return Started(sys.executable, SUPERVISE, *command, **{"PATH": path, "TMPDIR": str(tmp_path)} | fast)

    start.folder = tmp_path
    return start


def ready(started) -> tuple[dict[str, int], int]:
    """The ranks' processes, and the launcher's that is above them."""
    launcher = int(started.until(r"launcher is (\d+)")[1])
    found = {}
    while len(found) < 2:
        rank, pid = started.until(r"rank (\d) is (\d+)").groups()
        found[rank] = int(pid)
    return found, launcher


def nothing_left(folder) -> bool:
    return living(folder / "rank.py") == [] and list(folder.glob("megaresid-*")) == []


def test_no_report_is_missed_while_it_is_rewritten(tmp_path):
    """A rank whose report is passed over gets no signal, and its code does not count."""
    with Started(sys.executable, "-c", WRITER, tmp_path, str(os.getpid())) as started:
        started.until("writes")
        for _ in range(3000):
            [report] = read_reports(tmp_path)
            assert report.keys() == {"rank", "pid", "step", "code"} and report["pid"] == started.pid


def test_a_report_is_there_with_its_first_word(tmp_path, monkeypatch):
    """Seen at every call by which it is made: nobody finds a file without a word in it."""
    monkeypatch.setenv("MEGARESID_SUPERVISOR", str(tmp_path))
    seen = []
    for name in ("open", "pwrite", "replace"):
        call = getattr(os, name)

        def watched(*args, call=call):
            result = call(*args)
            seen.append([path.stat().st_size for path in tmp_path.glob("rank_*")])
            return result

        monkeypatch.setattr(os, name, watched)
    Report()
    assert len(seen) == 3 and all(sizes in ([], [128]) for sizes in seen) and seen[-1] == [128]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_the_ranks_and_the_code_is_theirs(launch, number):
    with launch("well") as started:
        ready(started)
        started.signal(number)
        started.until(f"{number.name}: the ranks save after this step and leave")
        assert started.code() == 75 and nothing_left(launch.folder)


def test_a_terminals_interrupt_reaches_the_supervisor_alone(launch):
    """Ctrl-C is sent to the whole foreground group; the launcher would end the ranks."""
    with launch("well") as started:
        ready(started)
        os.killpg(os.getpgid(started.pid), signal.SIGINT)
        assert started.code() == 75


def test_usr1_wishes_for_one_save_and_the_run_goes_on(launch):
    with launch("well") as started:
        ready(started)
        started.signal(signal.SIGUSR1)
        started.until(r"rank \d saves")  # one of them, whose wish becomes all ranks'
        started.signal(signal.SIGTERM)
        assert started.code() == 75 and started.said().count("saves") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_leaves_at_once(launch, number):
    with launch("deaf") as started:
        ready(started)
        started.signal(signal.SIGTERM)
        started.until("once more to leave at once")
        while "leaving at once" not in started.said() and family(started.pid):
            started.signal(number)  # until one comes that is not taken for the first one's double
        assert started.code() == 128 + number and nothing_left(launch.folder)


def test_a_signal_before_any_rank_has_started_leaves_at_once(launch, tmp_path):
    (tmp_path / "launcher.py").write_text("import time\nprint('slow', flush=True)\ntime.sleep(600)")
    with launch("well") as started:
        started.until("slow")
        started.signal(signal.SIGTERM)
        assert started.code() == 75 and nothing_left(launch.folder)


@pytest.mark.parametrize("which", ["launcher", "its parent"])
def test_no_rank_outlives_the_launcher(launch, which):
    with launch("deaf") as started:
        _, launcher = ready(started)
        pid = launcher if which == "launcher" else int(re.search(r"below (\d+)", started.said())[1])
        os.kill(pid, signal.SIGKILL)
        assert started.code() == 1, "a launcher that is killed ends with 0, as DeepSpeed's does"
        assert nothing_left(launch.folder)


def test_no_rank_outlives_the_supervisor(launch):
    with launch("deaf") as started:
        ranks, launcher = ready(started)
        started.signal(signal.SIGKILL)
        assert started.code() == -signal.SIGKILL  # and its output is closed: nobody holds it any more
        assert left_of([*ranks.values(), launcher]) == []


def test_a_rank_that_dies_ends_the_others_by_name_and_step(launch):
    with launch("deaf", **SHORT_GRACE) as started:
        ranks, _ = ready(started)
        os.kill(ranks["1"], signal.SIGKILL)
        found = started.until(r"error: rank 1 \(process (\d+)\) on \S+ died at step (\d+)")
        assert int(found[1]) == ranks["1"] and int(found[2]) >= 3
        assert started.code() == 1 and nothing_left(launch.folder)


@pytest.mark.parametrize(
    "how, code, said",
    [
        ("0", 0, ""),
        ("deaf,2", 2, ""),  # a mistake that only one rank sees: the others are ended, the code stays
        ("deaf,76", 76, ""),
        ("lingers", 0, ""),  # all have finished: that their processes do not end is no fault of the run
        ("lingers,deaf", 1, ""),
        ("deaf,fails", 1, r"error: rank 1 \(process \d+\) on \S+ failed at step 3"),
    ],
)
def test_the_code_is_what_the_ranks_say_whatever_the_launcher_returns(launch, how, code, said):
    with launch(how, **(SHORT_GRACE if {"deaf", "lingers"} & {*how.split(",")} else {})) as started:
        assert started.code() == code and nothing_left(launch.folder)
        assert re.search(said, started.said())


@pytest.mark.parametrize("how, code, starts", [("2", 2, 1), ("76", 76, 1), ("0", 0, 1), ("fails", 1, 3)])
def test_a_restart_is_for_faults_alone_and_at_most_so_often(launch, how, code, starts):
    with launch(how, "--restart", "2") as started:
        assert started.code() == code
        assert started.said().count("launcher is") == starts
        pauses = re.findall(r"failed at step 3: starting again in (\S+) s .*; (\d) restarts are left", started.said())
        assert pauses == [("0.05", "1"), ("0.1", "0")][: starts - 1]


def test_a_stopped_run_is_not_restarted_not_even_in_the_pause_before_it(launch):
    with launch("well", "--restart", "2") as started:
        ready(started)
        started.signal(signal.SIGTERM)
        assert started.code() == 75 and started.said().count("launcher is") == 1
    with launch("fails", "--restart", "2", MEGARESID_RESTART_SECONDS="600") as started:
        started.until("starting again in 600 s")
        started.signal(signal.SIGINT)
        assert started.code() == 75 and started.said().count("launcher is") == 1


@pytest.mark.parametrize(
    "given, has_checkpoint, wanted",
    [
        ([], False, ["--resume", "auto"]),
        (["--resume", "auto"], False, ["--resume", "auto"]),
        (["--resume=elsewhere"], True, ["--resume", "auto"]),
        (["--resume", "elsewhere"], True, ["--resume", "auto"]),
        (["--resume", "elsewhere"], False, ["--resume", "elsewhere"]),
        (["--config", "run.json"], True, ["--config", "run.json", "--resume", "auto"]),
        (["--config", "run.json"], False, ["--config", "run.json"]),
    ],
)
def test_a_restart_goes_on_from_the_runs_own_checkpoint(tmp_path, monkeypatch, given, has_checkpoint, wanted):
    import importlib.util

    spec = importlib.util.spec_from_file_location("supervise", SUPERVISE)
    supervise = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(supervise)
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(json.dumps({"resume": "elsewhere", "run_dir": "a run"}))
    if has_checkpoint:
        folder = tmp_path / "a run/checkpoints/step_00000004"
        folder.mkdir(parents=True)
        (folder / "complete.json").touch()
    begin = ["deepspeed", "--module", "megaresid.train", "--run_dir", "a run"]
    assert supervise.resumed([*begin, *given]) == [*begin, *wanted]


@pytest.mark.parametrize("value", ["-1", "two", ""])
def test_a_wrong_number_of_restarts_is_the_users_mistake(launch, value):
    with launch("well", f"--restart={value}") as started:
        assert started.code() == 2 and "error: --restart" in started.said()
