"""The command that measures saved models, and the report that it keeps."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_data import small_data
from made_runs import configuration, made_run
from task_data import made_rows, write_rows

from data_prep.tokenizer import gpt2_encoding
from megaresid.errors import UserError
from megaresid.evaluate import evaluate
from megaresid.evaluation import report
from megaresid.evaluation.loaded import LoadedModel
from megaresid.evaluation.perplexity import lambada, wikitext2
from megaresid.evaluation.tasks import tasks
from megaresid.saved_run import load_model

ITEMS, CONTEXT = 5, 12
HOOK = '''
def fails(engine):
    raise RuntimeError("no such thing")

def speaks(engine):
    return "seven"

def norms(engine):
    return {"norm": sum(p.detach().double().square().sum().item() for p in engine.parameters.values())}
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = small_data(tmp_path_factory.mktemp("data"))
    for name, rows in made_rows(ITEMS).items():
        if name.startswith(("arc", "hella", "piqa", "wino")):
            write_rows(folder / name, rows)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, str]:
    """A data set of random ids, and its identity."""
    from data_prep.manifest import write_manifest
    from data_prep.writer import ShardWriter
    from megaresid.data.manifest import Content, Manifest, Provenance, load_manifest

    folder, records, counts = tmp_path_factory.mktemp("shards"), [], {}
    for split, count in (("train", 300), ("val", 101)):
        writer = ShardWriter(folder, split, 1000)
        writer.append(np.random.default_rng(count).integers(0, 50257, count).astype(np.uint16))
        records += writer.finish()
        counts[split] = {"documents": 1, "tokens": count}
    tokenizer = {"name": "gpt2", "sha256": "0" * 64, "vocab_size": 50257, "end_of_text": 50256}
    content = Content(
        source={"kind": "text", "revision": "1"},
        options={"shard_tokens": 1000, "validation_fraction": 0.5},
        tokenizer=tokenizer,
        split_rule="by hand",
        splits=counts,
        dropped={"empty": 0},
        runs_cut=0,
        shards=tuple(records),
    )
    made = Provenance(created="2026-01-01T00:00:00+00:00", inputs=(), text_column="text", workers=1, versions={})
    write_manifest(folder, Manifest(schema=1, content=content, provenance=made))
    return folder, load_manifest(folder).identity


@pytest.fixture
def run(tmp_path, shards, monkeypatch) -> Path:
    """A run directory with a checkpoint at step 3."""
    folder, identity = shards
    monkeypatch.setattr("made_runs.DATA", identity)
    run = tmp_path / "run"
    made_run(run, configuration(data=[str(folder)], validation_tokens=60))
    folders = [{"folder": str(folder), "identity": identity, "share": "1"}]
    (run / "data.json").write_text(json.dumps({"schema": 1, "identity": identity, "folders": folders}))
    return run


def evaluated(*arguments) -> tuple[str, str]:
    """Runs on a rank: what the command prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        evaluate(*arguments)
    return out.getvalue(), err.getvalue()


def measured(run: Path) -> dict[tuple, dict]:
    tree = json.loads((run / "report" / "eval.json").read_text())
    assert tree["schema"] == 1
    return {(m["name"], m["step"], m["limit"]): m for m in tree["measurements"]}


def values(measurement: dict) -> dict[str, float]:
    return {name: given["value"] for name, given in measurement["metrics"].items()}


def validation_loss(model, shards: Path) -> float:
    """Mean over the whole windows in 60 tokens, one after another, in fp64."""
    ids = np.fromfile(shards / "val_000000.bin", "<u2", offset=1024).astype(np.int64)
    losses = []
    for start in range(0, 60 // CONTEXT * CONTEXT, CONTEXT):
        table = model.double()(torch.from_numpy(ids[start : start + CONTEXT])[None])[0][0].log_softmax(-1)
        losses += [-table[t, ids[start + t + 1]].item() for t in range(CONTEXT)]
    return sum(losses) / len(losses)


def test_the_command_measures_what_the_measures_do(run, data, shards, tmp_path, ranks1, monkeypatch):
    (tmp_path / "hooks_of_the_user.py").write_text(HOOK)
    monkeypatch.syspath_prepend(tmp_path)
    names = "validation wikitext2 lambada arc_easy,piqa hooks_of_the_user:norms"
    ((out, err),) = ranks1.run(evaluated, run, names, data, None)
    found = measured(run)
    model, encoding = load_model(run), gpt2_encoding()
    loaded = LoadedModel(model, torch.device("cpu"), None, 5 * CONTEXT)
    for name, measure in {"wikitext2": wikitext2(data, encoding), "lambada": lambada(data, encoding)}.items():
        assert values(found[name, 3, None]) == pytest.approx(measure(loaded), rel=1e-5)
    for name in ("arc_easy", "piqa"):
        expected = tasks([name], data, encoding)(loaded)
        assert report.metrics_of(expected) == found[name, 3, None]["metrics"]
        assert found[name, 3, None]["items"] == {name: ITEMS}
    squares = sum(p.detach().double().square().sum().item() for p in loaded.parameters.values())
    assert values(found["hooks_of_the_user:norms", 3, None])["norm"] == pytest.approx(squares)
    loss = validation_loss(model, shards[0])
    assert values(found["validation", 3, None])["val_loss"] == pytest.approx(loss, rel=1e-5)
    for name in found:
        about = {key: found[name][key] for key in ("data", "spec", "weights", "dtype", "ranks", "device")}
        checkpoint = str((run / "checkpoints" / "step_00000003").resolve())
        assert about == {
            "data": shards[1],
            "spec": model.plan.hash,
            "weights": checkpoint,
            "dtype": "float32",
            "ranks": 1,
            "device": "cpu",
        }
    assert found["piqa", 3, None]["files"] == {"piqa_valid.jsonl": report.sha256(data / "piqa_valid.jsonl")}
    assert list(found["lambada", 3, None]["files"]) == ["lambada_test.jsonl.gz"]
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["name", "number", "value", "stderr", "items", "seconds"]
    table = {(line[0], line[1]): line[2] for line in lines[1:-1]}
    accuracy = values(found["arc_easy", 3, None])["arc_easy/acc"]
    assert table["arc_easy", "acc"] == f"{accuracy:.4f}"
    assert len(table) == sum(len(each["metrics"]) for each in found.values())


def test_two_ranks_share_the_work_and_one_reports(run, data, ranks1, ranks2):
    names = "validation lambada piqa"
    ranks1.run(evaluated, run, names, data, None)
    alone = measured(run)
    (out, err), (other_out, _) = ranks2.run(evaluated, run, names, data, None)
    assert other_out == "" and "piqa" in out
    assert [line for line in err.splitlines() if not line.startswith("evaluating")] == [
        f"{name}: replaces what was measured before of step 3" for name in ("validation", "lambada", "piqa")
    ]
    shared = measured(run)
    assert shared.keys() == alone.keys()
    for key, found in shared.items():
        assert values(found) == pytest.approx(values(alone[key]), rel=1e-5)
        assert (found["ranks"], alone[key]["ranks"]) == (2, 1)


def test_other_steps_limits_and_names_are_kept(run, data, ranks1):
    ranks1.run(evaluated, run, "piqa", data, None)
    first = measured(run)["piqa", 3, None]
    ((_, err),) = ranks1.run(evaluated, run, "piqa,winogrande", data, 2)
    assert "replaces" not in err
    made_run(run, configuration(), step=4)
    ranks1.run(evaluated, run, "piqa", data, None)
    found = measured(run)
    assert found.keys() == {("piqa", 3, None), ("piqa", 3, 2), ("winogrande", 3, 2), ("piqa", 4, None)}
    assert found["piqa", 3, None] == first
    assert found["piqa", 3, 2]["items"] == {"piqa": 2}
    ranks1.run(evaluated, run / "checkpoints" / "step_00000003", "piqa", data, None)
    assert measured(run).keys() == found.keys()


def test_an_exported_folder_has_the_numbers_of_its_run(run, data, tmp_path, ranks1):
    from megaresid.exchange.write import write_exported

    write_exported(run, "safetensors", tmp_path / "exported", None, say=lambda line: None)
    for path in (run, tmp_path / "exported"):
        ranks1.run(evaluated, path, "lambada piqa", data, None)
    ours, its = measured(run), measured(tmp_path / "exported")
    assert {key: values(each) for key, each in ours.items()} == {key: values(each) for key, each in its.items()}
    with pytest.raises(UserError, match="--tasks validation: .* is an exported model, without the data"):
        evaluate(tmp_path / "exported", "validation", data)


def test_a_measure_that_fails_leaves_the_others_their_numbers(run, data, tmp_path, ranks1, ranks2, monkeypatch):
    (tmp_path / "failing_hooks.py").write_text(HOOK)
    monkeypatch.syspath_prepend(tmp_path)
    names = "failing_hooks:fails failing_hooks:speaks piqa"
    for pool in (ranks1, ranks2):
        with pytest.raises(UserError) as raised:
            pool.run(evaluated, run, names, data, None)
        place = f"{tmp_path / 'failing_hooks.py'}, line 3"
        assert str(raised.value) == (
            f"not measured: failing_hooks:fails: RuntimeError: no such thing ({place}); "
            "failing_hooks:speaks: it returned str, not a dictionary of numbers by name"
        )
        assert list(measured(run)) == [("piqa", 3, None)]


def test_by_default_all_seven_are_measured(run, data, ranks1):
    ranks1.run(evaluated, run, None, data, None)
    seven = ["validation", "wikitext2", "lambada", "arc_easy", "hellaswag", "piqa", "winogrande"]
    assert sorted(measured(run)) == sorted((name, 3, None) for name in seven)


@pytest.mark.parametrize(
    "names, message",
    [
        ("piqa@end", "--tasks piqa@end: there are no steps to measure at: leave @end away"),
        ("piqa piqa", "--tasks: piqa is named 2 times"),
        (" ", "--tasks ' ': name at least one"),
        ("mnli", "task 'mnli': --eval-data has files for arc_easy"),
        ("nowhere:function", "nowhere:function: cannot import it"),
    ],
)
def test_names_that_cannot_be_measured_are_refused(run, data, names, message):
    with pytest.raises(UserError, match=message):
        evaluate(run, names, data)
    assert not (run / "report").exists()


def test_a_limit_below_one_is_refused(run, data):
    with pytest.raises(UserError, match="--limit 0: must be at least 1"):
        evaluate(run, "piqa", data, 0)


def test_a_missing_and_a_damaged_file_are_refused(run, data, tmp_path):
    (tmp_path / "some").mkdir()
    with pytest.raises(UserError, match="there is no piqa_valid.jsonl"):
        evaluate(run, "piqa", tmp_path / "some")
    (tmp_path / "some" / "piqa_valid.jsonl").write_text('{"goal": "a", "sol1": "b"}\n')
    with pytest.raises(UserError, match="piqa_valid.jsonl, line 1: no field 'sol2'"):
        evaluate(run, "piqa", tmp_path / "some")


def test_other_validation_data_than_the_runs_is_refused(run, data, monkeypatch):
    tree = json.loads((run / "data.json").read_text())
    monkeypatch.setattr("made_runs.DATA", "another")
    made_run(run, configuration(data=[tree["folders"][0]["folder"]]), step=5)
    with pytest.raises(UserError, match="--tasks validation: .* holds other data than .* was trained on"):
        evaluate(run, "validation", data)


def test_a_model_of_another_vocabulary_is_refused_before_it_is_loaded(run, data, monkeypatch):
    from megaresid.model import plan

    shape = configuration().shape.model_copy(update={"vocab_size": 300})
    monkeypatch.setattr("megaresid.saved_run.open_saved", lambda path: Saved(plan.ModelPlan(shape)))
    with pytest.raises(UserError, match="--tasks piqa: .* of 50257 ids, and the model of here predicts 300"):
        evaluate(run, "piqa", data)


class Saved:
    config, folder, weights = None, Path("."), "here"

    def __init__(self, plan):
        self.plan = plan


def test_a_users_mistake_is_one_line_and_code_2(tmp_path):
    command = [sys.executable, "-m", "megaresid.evaluate", "--run", str(tmp_path / "nowhere"), "--tasks", "piqa"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_help_waits_for_no_torch():
    code = "import sys, megaresid.evaluate; sys.argv[1:] = ['--help']\n"
    code += "try: megaresid.evaluate.main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--eval-data" in done.stdout and done.stdout.splitlines()[-1] == "False"


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_under_a_launcher(run, data, launcher):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        # The two dashes keep torchrun from taking --run for an option of its own.
        "torchrun": ["--standalone", "--nproc-per-node=2", "-m", "--"],
        "deepspeed": ["--log_level", "error", "--num_accelerators", "2", "--master_port", str(port), "--module"],
    }
    command = [str(Path(sys.executable).parent / launcher), *options[launcher], "megaresid.evaluate"]
    command += ["--run", str(run), "--tasks", "piqa", "--eval-data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("piqa ") for line in done.stdout.splitlines()) == 2
    assert measured(run)["piqa", 3, None]["ranks"] == 2


def entry(name: str, step: int = 0) -> dict:
    return {"name": name, "step": step, "limit": None, "metrics": {}}


def test_the_report_has_numbers_with_their_errors_and_null_for_what_is_not_finite():
    numbers = {"a/acc": 0.5, "a/acc_stderr": 0.1, "ppl": float("inf"), "b_stderr": 2.0}
    numbers |= {"c": 1.0, "c_stderr": float("nan")}
    assert report.metrics_of(numbers) == {
        "a/acc": {"value": 0.5, "stderr": 0.1},
        "ppl": {"value": None},
        "b_stderr": {"value": 2.0},
        "c": {"value": 1.0, "stderr": None},
    }


def test_processes_that_report_at_once_lose_nothing(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        replaced = list(pool.map(lambda i: report.add(tmp_path, entry(f"task{i % 20}", i // 20)), range(40)))
    assert not any(replaced)
    assert [(m["step"], m["name"]) for m in report.read(tmp_path)] == sorted(
        (step, f"task{i}") for i in range(20) for step in range(2)
    )
    assert report.add(tmp_path, entry("task3"))
    assert len(report.read(tmp_path)) == 40


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "eval.json is damaged"),
        ('{"schema": 1}', "eval.json is damaged"),
        ('{"schema": 1, "measurements": [{}]}', "eval.json is damaged"),
        ("[]", "eval.json is damaged"),
        ('{"schema": 9, "measurements": []}', "its schema is 9, and this version writes 1"),
    ],
)
def test_a_report_that_cannot_be_added_to_stops_the_command_at_once(run, data, text, message):
    (run / "report").mkdir()
    path = run / "report" / "eval.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        evaluate(run, "piqa", data)
    assert path.read_text() == text
