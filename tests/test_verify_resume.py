"""The command that compares a resumed run with the uninterrupted one: it must find what differs, and nothing else."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made_runs import made_run
from safetensors.torch import load_file, save_file

from data_prep.__main__ import main as data_prep
from megaresid.data.loader import Loader
from megaresid.data.sampler import Sampler
from megaresid.run_comparison import (
    compare_checkpoints,
    compare_numbers,
    compare_traces,
    environments_differ,
)
from megaresid.training.trace import Trace, trace_file
from megaresid.verify_resume import OURS, main

TRAINED = {"tokens_per_second": 5.0, "mfu": None, "memory_bytes": 7, "training_seconds": 1.5, "learning_rate": 0.1}


def run_of(folder: Path, losses: dict[int, float], validations: dict[int, float], seconds: float = 1.0) -> Path:
    """A run directory's metrics, with costs that no two runs share."""
    folder.mkdir()
    rows = [
        {"schema": 1, "step": step, "train_loss": loss, "gradient_norm": 2 * loss}
        | {key: value and value * seconds for key, value in TRAINED.items()}
        for step, loss in losses.items()
    ]
    rows += [
        {"step": step, "tokens": 64, "val_loss": loss, "seconds/validation": seconds}
        for step, loss in validations.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


LOSSES, VALIDATIONS = {1: 3.25, 2: 3.1, 3: 2.9}, {0: 4.5, 3: 3.0}


def numbers(tmp_path, losses: dict, validations: dict = VALIDATIONS, tolerance: float = 0.0) -> dict[str, tuple]:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    whole = run_of(folder / "whole", LOSSES, VALIDATIONS)
    resumed = run_of(folder / "resumed", losses, validations, seconds=2.0)
    return {row.what: (row.difference, row.fault) for row in compare_numbers(whole, resumed, tolerance)}


def test_numbers_are_equal_whatever_they_cost(tmp_path):
    found = numbers(tmp_path, LOSSES)
    assert found == dict.fromkeys(("losses", "gradient norms", "evaluations"), (None, False))


def test_one_loss_that_differs_in_its_last_bit_is_found(tmp_path):
    other = math.nextafter(3.1, 4)
    found = numbers(tmp_path, LOSSES | {2: other})
    difference, fault = found["losses"]
    assert fault and difference.startswith(f"first step 2: 3.1 and {other!r}; 1 in all")
    assert found["gradient norms"][1] and found["evaluations"] == (None, False)


def test_a_step_that_is_missing_or_one_too_many_is_found(tmp_path):
    difference, fault = numbers(tmp_path, {1: 3.25, 2: 3.1})["losses"]
    assert fault and "first step 3: 2.9 and None" in difference
    assert numbers(tmp_path, LOSSES | {4: 2.8}, tolerance=1.0)["losses"][1]


def test_an_evaluation_that_differs_or_was_not_made_is_found(tmp_path):
    difference, fault = numbers(tmp_path, LOSSES, {0: 4.5, 3: 3.5})["evaluations"]
    assert fault and "first val_loss at step 3: 3.0 and 3.5; 1 in all" in difference
    assert numbers(tmp_path, LOSSES, {3: 3.0})["evaluations"][1]


def test_rounding_on_a_gpu_is_told_and_no_fault(tmp_path):
    difference, fault = numbers(tmp_path, LOSSES | {3: 2.9 * (1 + 1e-4)}, tolerance=1e-3)["losses"]
    assert not fault and "the largest difference 0.0001" in difference
    assert numbers(tmp_path, LOSSES | {3: 2.9 * 1.01}, tolerance=1e-3)["losses"][1]


def test_runs_without_a_step_are_no_proof(tmp_path):
    whole, resumed = run_of(tmp_path / "whole", {}, {}), run_of(tmp_path / "resumed", {}, {})
    assert compare_numbers(whole, resumed)[0].fault
    assert all(row.fault for row in compare_traces(tmp_path / "no", [tmp_path / "none"]))


def traced(folder: Path, rows: dict[int, list[tuple]]) -> Path:
    """Traces by rank, of (step, sample, tokens) each."""
    folder.mkdir()
    for rank, of_rank in rows.items():
        lines = [
            json.dumps(
                {"step": step, "accumulation": 0, "samples": [sample], "windows": [9 - sample], "tokens": tokens}
            )
            for step, sample, tokens in of_rank
        ]
        trace_file(folder, rank).write_text("".join(line + "\n" for line in lines))
    return folder


GIVEN = {0: [(0, 0, "a"), (1, 2, "b"), (2, 4, "c")], 1: [(0, 1, "d"), (1, 3, "e"), (2, 5, "f")]}


def traces(tmp_path, killed: dict, resumed: dict) -> dict[str, str | None]:
    parts = [traced(tmp_path / "killed", killed), traced(tmp_path / "resumed", resumed)]
    rows = compare_traces(traced(tmp_path / "whole", GIVEN), parts)
    assert all(row.fault == (row.difference is not None) for row in rows)
    return {row.what: row.difference for row in rows}


def split_at(step: int, rows: dict) -> tuple[dict, dict]:
    return {rank: of[:step] for rank, of in rows.items()}, {rank: of[step:] for rank, of in rows.items()}


def test_traces_that_go_on_with_each_other_are_one(tmp_path):
    assert traces(tmp_path, *split_at(2, GIVEN)) == {"samples": None, "tokens": None}


def test_what_rank_1_alone_was_given_otherwise_is_found(tmp_path):
    other = GIVEN | {1: [(0, 1, "d"), (1, 3, "e"), (2, 3, "f")]}
    found = traces(tmp_path, *split_at(2, other))
    assert found == {"samples": "rank_00001, micro-batch 2 (step 3), and 0 more", "tokens": None}


def test_other_tokens_behind_the_same_samples_are_found(tmp_path):
    other = GIVEN | {0: [(0, 0, "a"), (1, 2, "b"), (2, 4, "x")]}
    found = traces(tmp_path, *split_at(1, other))
    assert found == {"samples": None, "tokens": "rank_00000, micro-batch 2 (step 3), and 0 more"}


@pytest.mark.parametrize("again", [0, 2])
def test_a_step_that_is_given_twice_or_left_out_is_found(tmp_path, again):
    killed, _ = split_at(1, GIVEN)
    _, resumed = split_at(again, GIVEN)
    assert traces(tmp_path, killed, resumed)["samples"].startswith("rank_00000, micro-batch 1 (step")


def test_a_rank_that_gave_no_trace_is_found(tmp_path):
    assert "rank_00001" in traces(tmp_path, {0: GIVEN[0]}, {})["samples"]


def checkpoints(tmp_path, **other) -> tuple[Path, Path]:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    made_run(folder / "whole")
    made_run(folder / "resumed", **other)
    return tuple(folder / name / "checkpoints" / "step_00000003" for name in ("whole", "resumed"))


def differences(whole: Path, resumed: Path, **how) -> dict[str, tuple]:
    return {row.what: (row.difference, row.fault) for row in compare_checkpoints(whole, resumed, **how)}


def rewrite(checkpoint: Path, name: str, change) -> None:
    """Change a file of a checkpoint, and its record."""
    change(checkpoint / name)
    marker = json.loads((checkpoint / "complete.json").read_text())
    content = (checkpoint / name).read_bytes()
    marker["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "complete.json").write_text(json.dumps(marker))


def flip(key: str):
    """The last bit of the last element of a tensor."""

    def change(path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors[key].view(torch.int32)[-1] ^= 1
        save_file(tensors, path, metadata)

    return change


def test_equal_states_are_equal_however_the_ranks_share_them(tmp_path):
    whole, resumed = checkpoints(tmp_path)
    assert set(differences(whole, resumed).values()) == {(None, False)}
    found = differences(*checkpoints(tmp_path, ranks=3))
    assert found["parameters"] == found["optimizer state"] == (None, False)
    assert found["generators"] == ("2 ranks and 3", True)


@pytest.mark.parametrize("kind, what", [("parameter", "parameters"), ("exp_avg", "optimizer state")])
def test_one_bit_of_the_state_is_found(tmp_path, kind, what):
    whole, resumed = checkpoints(tmp_path)
    rewrite(resumed, "rank_00001.safetensors", flip(f"{kind}:layers.01.mlp.site.norm.weight"))
    found = differences(whole, resumed)
    difference, fault = found.pop(what)
    assert fault and "layers.01.mlp.site.norm.weight and 0 more" in difference
    assert set(found.values()) == {(None, False)}
    assert differences(whole, resumed, exact=False)[what] == (difference, False)


def test_a_number_of_the_optimizer_and_a_generator_are_found(tmp_path):
    whole, resumed = checkpoints(tmp_path)

    def change(path):
        tree = json.loads(path.read_text())
        tree["generators"][1] = {"cpu": "AAAA"}
        tree["scalars"]["head.norm.weight"] = {"step": 4}
        path.write_text(json.dumps(tree))

    rewrite(resumed, "checkpoint.json", change)
    found = differences(whole, resumed)
    assert found["generators"] == ("rank 1", True) and found["parameters"] == (None, False)
    assert found["optimizer state"] == ("step:head.norm.weight and 0 more", True)


def test_another_environment_is_told():
    here = {"ranks": 2, "threads_per_rank": 1, "versions": {"torch": "2.13", "numpy": "2"}, "started": "now"}
    assert environments_differ(here, here | {"started": "later", "command": ["x"]}) == []
    there = here | {"threads_per_rank": 2, "versions": {"torch": "2.12", "numpy": "2"}}
    assert environments_differ(here, there) == ["threads_per_rank 1 and 2", "torch 2.13 and 2.12"]


class Stream:
    def __len__(self):
        return 400

    def read_windows(self, windows, context):
        return (windows[:, None] * context + np.arange(context + 1)).astype(np.uint16)


def loaded(rank: int, first: int):
    """Under a trace, all that rank ``rank`` of 2 is given from step ``first`` to step 5; 2 x 3 sequences each."""
    trace = Trace(rank, first, accumulation=2)
    sizes = {"context": 8, "global_batch": 12, "micro_batch": 3, "ranks": 2, "rank": rank, "vocab_size": 500}
    with Loader(Stream(), trace.sampler(Sampler(49, 1)), **sizes, first_step=first, last_step=5) as loader:
        return list(trace.batches(iter(loader)))


def test_a_trace_holds_what_a_rank_was_given(tmp_path, monkeypatch):
    plain = loaded(1, first=2)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("MEGARESID_TRACE", str(tmp_path))
    batches = loaded(1, first=2)
    for one, other in zip(plain, batches, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    rows = [json.loads(line) for line in trace_file(tmp_path, 1).read_text().splitlines()]
    assert [(row["step"], row["accumulation"]) for row in rows] == [(s, a) for s in (2, 3, 4) for a in (0, 1)]
    for row, (idx, targets) in zip(rows, batches, strict=True):
        begin = row["step"] * 12 + row["accumulation"] * 6 + 3  # sample s = step*G + accumulation*R*m + rank*m + j
        assert row["samples"] == [begin, begin + 1, begin + 2]
        assert row["windows"] == Sampler(49, 1).window_of(np.array(row["samples"])).tolist()
        assert row["windows"] == [int(first) // 8 for first in idx[:, 0]]
        both = idx.numpy().tobytes() + targets.numpy().tobytes()
        assert row["tokens"] == hashlib.sha256(both).hexdigest()


def exits(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_options_that_cannot_be(capsys):
    steps = ("--first", "3", "--second", "4", "--data", "d", "--deepspeed_config", "c")
    assert "the following arguments are required: --first" in exits(capsys, "--second", "3")
    assert "error: --second 0: must be at least 1" in exits(capsys, *steps, "--second", "0")
    assert "error: --ranks -1: must be at least 1" in exits(capsys, *steps, "--ranks", "-1")
    for name in OURS:
        for given in (name, name.replace("-", "_").replace("__", "--") + "=x"):
            assert f"error: {name}: it is set for each of the runs" in exits(capsys, *steps, given)
    assert "did you mean 'learning-rate'" in exits(capsys, *steps, "--learning-rte", "3")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """Data, a DeepSpeed JSON, and a plugin that plants the fault that the environment names."""
    folder = tmp_path_factory.mktemp("verify")
    rows = [
        json.dumps({"text": f"Line {n} of a text about the number {n * n}, and of others. " * 9}) for n in range(40)
    ]
    (folder / "text.jsonl").write_text("\n".join(rows))
    options = ["--source", "jsonl", "--input", str(folder / "text.jsonl"), "--validation-fraction", "0.2"]
    data_prep([*options, "--out", str(folder / "data")])
    optimizer = {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}
    (folder / "ds.json").write_text(json.dumps({"optimizer": optimizer, "zero_optimization": {"stage": 2}}))
    values = {"data": str(folder / "data"), "deepspeed_config": str(folder / "ds.json"), "model": "tiny"}
    values |= {"layers": 2, "width": 32, "context": 32, "dropout": 0.1, "global_batch_size": 8, "micro_batch_size": 2}
    values |= {"validation_tokens": 320, "eval": "validation@2 plants_a_fault:measure@end", "resume": "auto"}
    (folder / "run.json").write_text(json.dumps(values))
    (folder / "plants_a_fault.py").write_text(PLUGIN)
    (folder / "temporary").mkdir()
    return folder


PLUGIN = """
import os
import torch
from megaresid.data.sampler import Sampler

fault, rank = os.environ.get("PLANTED"), os.environ["RANK"]
if fault == "generator" and rank == "1":
    restore, calls = torch.set_rng_state, []
    def forget_the_first(state):  # what a resume restores
        calls.append(1)
        if len(calls) > 1:
            restore(state)
    torch.set_rng_state = forget_the_first
if fault == "order":
    window_of = Sampler.window_of
    def from_the_start(self, samples):
        self.first = getattr(self, "first", samples.min() // 8 * 8)
        return window_of(self, samples - self.first)
    Sampler.window_of = from_the_start

def measure(engine):
    return {"nothing": 0}
"""


TOKEN = "hf_" + "S3cretOfATest" * 2


def check_secrets(folder: Path) -> None:
    """Nothing that the runs wrote or printed holds a secret of their environment."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"environment.json", "config.json", "output.txt", "checkpoint.json"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert TOKEN.encode() not in content and TOKEN[::-1].encode() not in content, path


def verify(
    workplace: Path, planted: str = "", first: int = 2, second: int = 2, options=()
) -> tuple[int, str, list[Path]]:
    """Exit code, output, and what stayed in the temporary folder."""
    command = [sys.executable, "-m", "megaresid.verify_resume", "--config", str(workplace / "run.json")]
    command += ["--first", str(first), "--second", str(second), "--ranks", "2", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PLANTED": planted}
    temporary = Path(tempfile.mkdtemp(dir=workplace / "temporary"))  # its own: another one's may have been ended
    environment |= {
        "HF_TOKEN": TOKEN,
        "WANDB_API_KEY": TOKEN[::-1],
        "PYTHONPATH": str(workplace),
        "TMPDIR": str(temporary),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    kept = list(temporary.glob("megaresid-verify-*"))
    for folder in kept:
        assert str(folder) in done.stdout, done.stdout + done.stderr
        check_secrets(folder)
        shutil.rmtree(folder)
    return done.returncode, done.stdout + done.stderr, kept


def table(said: str) -> dict[str, str]:
    """What the table says of each row, after how much was compared."""
    rows = (re.split(r"  +", line.strip(), maxsplit=2) for line in said.splitlines())
    return {row[0]: row[2] for row in rows if len(row) == 3}


@pytest.mark.full
def test_the_command_finds_a_generator_of_rank_1_that_is_not_restored(workplace):
    """In real processes, under the launcher, killed by kill -9; what is not at fault is equal."""
    code, said, kept = verify(workplace, "generator")
    assert code == 1 and len(kept) == 1, said
    found = table(said)
    assert found["losses"].startswith("DIFFERS: first step 3: "), said
    assert found["generators"] == "DIFFERS: rank 1" and found["parameters"].startswith("DIFFERS: ")
    assert found["samples"] == found["tokens"] == found["environment"] == "equal"
    assert "16 micro-batches of 2 ranks" in said and "2 ranks of 1 threads, torch" in said
    for line in ("run 1 of 3, 4 steps", "run 2 of 3, 2 steps and kill -9", "run 3 of 3, resume, 2 steps"):
        assert f"verify_resume: {line}" in said


@pytest.mark.full
def test_the_command_finds_an_order_of_the_data_that_starts_again(workplace):
    code, said, kept = verify(workplace, "order")
    found = table(said)
    assert code == 1 and kept and found["samples"].startswith("DIFFERS: rank_00000, micro-batch 4 (step 3)"), said
    assert found["tokens"].startswith("DIFFERS: ") and found["generators"] == "equal"


@pytest.mark.full
def test_the_command_finds_nothing_in_a_run_without_a_fault_and_leaves_nothing(workplace):
    code, said, kept = verify(workplace, first=3, second=4)
    assert code == 0 and not kept and "equal, bit for bit" in said, said
    assert set(table(said).values()) == {"equal"} and len(table(said)) == 9


@pytest.mark.full
def test_a_mistake_that_only_the_runs_see_is_told_as_the_users(workplace):
    code, said, kept = verify(workplace, options=("--micro-batch-size", "3"))
    assert code == 2 and not kept and "error: " in said and "micro-batch 3" in said, said
    assert "Traceback" not in said
