"""The command: what it prints, and how it ends."""

import json
import os
import pty
import signal
import struct
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from jobs import (
    DOCUMENTS,
    data_set,
    expected_shards,
    expected_tokens,
    read_shard,
    shard_bytes,
    small_units,
    write_rows,
)

from data_prep import progress
from data_prep.__main__ import main
from data_prep.tokenizer import gpt2_encoding
from megaresid.data.manifest import load_manifest


@pytest.fixture(autouse=True)
def signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    small_units(monkeypatch)
    return write_rows(tmp_path / "rows.jsonl", DOCUMENTS)


def run(capsys, *arguments):
    """(exit code, stdout, stderr) of the command."""
    capsys.readouterr()
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def made_of(rows, out, *options):
    given = ["--source", "jsonl", "--input", rows, "--out", out, "--workers", 1, "--shard-tokens", 100]
    return [*given, "--validation-fraction", 0.2, *options]


def test_it_makes_inspects_and_verifies(tmp_path, capsys):
    out = tmp_path / "docs"
    assert run(capsys, "--source", "python-docs", "--workers", 1, "--out", out)[0] == 0
    manifest = load_manifest(out)
    tokens = sum(counts.tokens for counts in manifest.content.splits.values())
    assert 400_000 < tokens < 1_500_000
    assert manifest.content.source.revision.endswith(".".join(map(str, sys.version_info[:3])))
    code, printed, _ = run(capsys, "inspect", out)
    assert code == 0
    assert json.JSONDecoder().raw_decode(printed)[0] == json.loads((out / "manifest.json").read_text())
    ids = read_shard(out / "train_000000.bin")
    first = ids[1 : ids.index(50256, 1)][:1000]
    assert printed.endswith(":\n" + gpt2_encoding().decode(first) + "\n")
    assert run(capsys, "verify", out)[0] == 0
    (out / "train_000001.bin").write_bytes(b"")
    code, _, error = run(capsys, "verify", out)
    assert code == 0 and "train_000001.bin: not of this data set" in error and error.count(".bin") == 1
    (out / "train_000001.bin").unlink()
    shard = out / "val_000000.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, printed, error = run(capsys, "verify", out)
    assert (code, printed) == (1, "") and "val_000000.bin: damaged" in error and "train" not in error
    shard.write_bytes(data[:-2])
    code, _, error = run(capsys, "verify", out)
    assert code == 1 and "val_000000.bin: cut short" in error


def test_mistakes_are_told_in_one_line(rows, tmp_path, capsys):
    for arguments in (
        ["--source", "text", "--input", tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / "out"],
        made_of(rows, tmp_path / "out", "--partition", "5/4"),
        made_of(rows, tmp_path / "out", "--text-column", "body"),
        ["inspect", tmp_path / "out"],
        ["verify", tmp_path / "out"],
        ["adopt", tmp_path / "out"],
        ["convert", tmp_path / "out", "--to", "nanogpt", "--out", tmp_path / "made"],
        ["merge", tmp_path / "out", "--out", tmp_path / "made"],
    ):
        code, printed, error = run(capsys, *arguments)
        assert (code, printed) == (2, ""), arguments
        assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path) in error or "5/4" in error
        assert not (tmp_path / "out").exists() and not (tmp_path / "made").exists()


def test_help_tells_of_every_option_and_command(capsys):
    code, printed, _ = run(capsys, "--help")
    assert code == 0
    for word in ("--resume", "--partition", "--limit-tokens", "--deduplicate", "merge", "verify", "adopt", "convert"):
        assert word in printed
    for command in ("inspect", "verify", "merge", "adopt", "convert"):
        assert run(capsys, command, "--help")[0] == 0


def test_several_inputs_follow_one_option(tmp_path, capsys):
    for n in range(40):
        (tmp_path / f"{n:02d}.txt").write_text(f"Text number {n}.")
    files = sorted(tmp_path.glob("*.txt"))
    arguments = ["--source", "text", "--input", *files, "--validation-fraction", "0.3", "--out", tmp_path / "out"]
    code, printed, _ = run(capsys, *arguments, "--workers", 1)
    assert code == 0 and printed.splitlines()[-1].startswith(f"{tmp_path / 'out'}: ")
    assert load_manifest(tmp_path / "out").provenance.inputs == tuple(map(str, files))


def test_the_summary_names_every_count_that_is_not_zero(tmp_path, capsys, monkeypatch):
    small_units(monkeypatch)
    rows = write_rows(tmp_path / "rows.jsonl", ["", *DOCUMENTS, DOCUMENTS[3], " ", "x" * 70_000])
    with open(rows, "ab") as file:
        file.write(b'{"text": 3}\n')
    code, printed, _ = run(capsys, *made_of(rows, tmp_path / "out", "--deduplicate"))
    assert code == 0
    tokens = {split: len(ids) for split, ids in expected_tokens([*DOCUMENTS], 0.2).items()}
    val = f"val: {expected_tokens(DOCUMENTS, 0.2)['val'].count(50256)} documents, {tokens['val']:,} tokens, "
    assert val in printed
    assert "left out: 2 empty documents, 1 bad rows, 1 duplicates\n" in printed
    assert "cut: 1 endless unbroken runs\n" in printed and "limit" not in printed
    code, printed, _ = run(capsys, *made_of(rows, tmp_path / "short", "--limit-tokens", 300))
    assert "ended by --limit-tokens 300\n" in printed and "cut:" not in printed and "1 bad" not in printed


def test_shares_are_made_and_merged(rows, tmp_path, capsys):
    shares = [tmp_path / "one", tmp_path / "two"]
    for number, out in enumerate(shares, 1):
        code, printed, _ = run(capsys, *made_of(rows, out, "--partition", f"{number}/2"))
        assert code == 0 and f"share {number}/2 is finished" in printed
        assert "python -m data_prep merge SHARE-1 SHARE-2 --out DIR" in printed
    code, printed, _ = run(capsys, "merge", *shares, "--out", tmp_path / "joined")
    assert code == 0 and printed.splitlines()[-1].startswith(f"{tmp_path / 'joined'}: ")
    assert shard_bytes(tmp_path / "joined") == expected_shards(DOCUMENTS)
    data_set(tmp_path / "joined")


def test_a_dry_run_prints_the_plan_and_writes_nothing(rows, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    code, printed, error = run(capsys, *made_of(rows, tmp_path / "out", "--dry-run"))
    assert code == 0 and error == "" and sorted(tmp_path.rglob("*")) == before
    assert "jsonl, 1 files of " in printed and str(rows) in printed and "expected: " in printed and "of disk" in printed


def test_ready_made_shards_are_adopted_and_converted(tmp_path, capsys):
    (tmp_path / "found").mkdir()
    for name, data in expected_shards(DOCUMENTS, shard_tokens=10**6).items():
        (tmp_path / "found" / f"fineweb_{name}").write_bytes(data)
    code, printed, _ = run(capsys, "adopt", tmp_path / "found")
    assert code == 0 and f"train: {expected_tokens(DOCUMENTS, 0.2)['train'].count(50256)} documents" in printed
    assert run(capsys, "verify", tmp_path / "found")[0] == 0
    code, printed, _ = run(capsys, "convert", tmp_path / "found", "--to", "nanogpt", "--out", tmp_path / "nano")
    assert code == 0 and "written for nanogpt" in printed
    ids = np.fromfile(tmp_path / "nano" / "train.bin", "<u2").tolist()
    train = expected_tokens(DOCUMENTS, 0.2)["train"]
    assert ids == [*train[1:], 50256]
    code, printed, _ = run(capsys, "convert", tmp_path / "nano", "--from", "nanogpt", "--out", tmp_path / "back")
    assert code == 0 and printed.splitlines()[-1].startswith(f"{tmp_path / 'back'}: ")
    assert read_shard(tmp_path / "back" / "train_000000.bin") == train


def test_the_first_document_of_shards_that_begin_inside_one(tmp_path, capsys):
    ids = gpt2_encoding().encode_ordinary("Hello world and more")
    for name, held in (("train", [*ids, 50256, 40]), ("val", [50256, 40])):
        header = struct.pack("<256i", 20240520, 1, len(held), *[0] * 253)
        (tmp_path / f"{name}.bin").write_bytes(header + struct.pack(f"<{len(held)}H", *held))
    assert run(capsys, "adopt", tmp_path)[0] == 0
    assert run(capsys, "inspect", tmp_path)[1].endswith(":\nHello world and more\n")


@pytest.fixture
def interruptible():
    """Ctrl-C is heeded, though the tests themselves may run in the background, where it is not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("sent, code, says", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_signals_end_it_in_one_line(rows, tmp_path, capsys, monkeypatch, sent, code, says):
    shown = []

    def report(*counts):
        shown.append(counts)
        if len(shown) == 4:
            signal.raise_signal(sent)

    monkeypatch.setattr("data_prep.command.progress_display", lambda: progress_of(report))
    ended, printed, error = run(capsys, *made_of(rows, tmp_path / "out"))
    assert (ended, printed) == (code, "") and error.endswith(f"{says}; a job goes on with --resume\n")
    assert shard_bytes(tmp_path / "out") == {} and list((tmp_path / "out" / "parts").glob("0*.json"))
    monkeypatch.undo()
    small_units(monkeypatch)
    assert run(capsys, *made_of(rows, tmp_path / "out", "--resume"))[0] == 0
    assert shard_bytes(tmp_path / "out") == expected_shards(DOCUMENTS)


class progress_of:
    """A display that hands out ``report``."""

    def __init__(self, report):
        self.report = report

    def __enter__(self):
        return self.report

    def __exit__(self, *_):
        pass


def test_a_plain_line_comes_every_half_minute(capsys):
    clock = Counter(now=0)
    report = progress._report_in_lines(progress.Pace(lambda: clock["now"]), lambda: clock["now"])
    for second in range(0, 100):
        clock["now"] = second
        report(second / 100, second, 1000 * second)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["30%", "60%", "90%"]
    assert lines[0] == " 30%  30 documents  30,000 tokens (1,000/s)  70 s left"


def test_a_terminal_has_a_bar():
    """Under a pseudo-terminal the percentage is drawn again and again."""
    leader, follower = pty.openpty()
    code = (
        "from data_prep.progress import progress_display\n"
        "with progress_display() as report:\n"
        "    report(0.25, 10, 1000)\n"
        "    report(1.0, 40, 4000)\n"
    )
    subprocess.run([sys.executable, "-c", code], stderr=follower, check=True, env={"TERM": "xterm", "PATH": ""})
    drawn = b""
    while b"100%" not in drawn:
        drawn += os.read(leader, 4096)
    assert b"40 documents" in drawn and b"4,000 tokens" in drawn


def test_workers_import_little():
    """What each of 16 processes needs before it can begin; the command's own parts are not among it."""
    code = (
        "import sys, data_prep.__main__, data_prep.pool\n"
        "print(*{name.split('.')[0] for name in sys.modules})\n"
        "print(*sorted(name for name in sys.modules if name.startswith('data_prep')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages, own = (set(line.split()) for line in done.stdout.splitlines())
    assert "numpy" in packages and "data_prep.worker" in own
    assert not packages & {"torch", "tyro", "rich", "pyarrow", "huggingface_hub", "deepspeed"}
    assert not own & {"data_prep.command", "data_prep.pipeline"}

