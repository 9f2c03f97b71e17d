"""Run directories as they should not be: each is told in one line."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_sweeps import STEPS, write_run, write_sweep

from megaresid.compare.comparison import compare
from megaresid.compare.results import Comparison
from megaresid.compare.runs import read_runs
from megaresid.errors import UserError

FILES = ("config.json", "spec.json", "ds_config.json", "environment.json", "data.json", "metrics.jsonl")


def line_on(folder, name):
    found = read_runs([folder])
    (line,) = [problem.line for problem in found.problems if problem.run == name]
    return line


def told(folder, name):
    """What the comparison says of a run beside a good one."""
    write_run(folder / "good")
    (line,) = [problem.line for problem in compare([folder]).problems if problem.run == name]
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    (write_run(tmp_path / "bad") / name).unlink()
    assert name in told(tmp_path, "bad")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b"{" * 3000, b'{"schema": 1', b"null\n"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (write_run(tmp_path / "bad") / name).write_bytes(content)
    line = told(tmp_path, "bad")
    # Of metrics a last line that is cut short is as a crash leaves it.
    assert name in line or name == "metrics.jsonl" and "unfinished at step 0" in line


@pytest.mark.parametrize("schema", [2, None, "1", [1]])
def test_another_schema_is_told(tmp_path, schema):
    path = write_run(tmp_path / "bad") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": schema}))
    assert "schema" in told(tmp_path, "bad")


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"steps": "100"}, {"seed": None}, {"learning_rate": "x"}, {"residual": 3}]
)
def test_a_configuration_of_other_values_is_told_by_its_key(tmp_path, change):
    path = write_run(tmp_path / "bad") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (key,) = change
    assert f"config.json is damaged or no run's: {key}" in told(tmp_path, "bad")


def edit_rows(run, edit):
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(edit(rows)) + "\n")


@pytest.mark.parametrize(
    "edit, words",
    [
        (lambda rows: [*rows[:3], "{bro", *rows[3:]], "line 4 is not JSON"),
        (lambda rows: [*rows[:3], "[1]", *rows[3:]], "line 4 is no row with a step"),
        (lambda rows: [*rows[:3], '{"step": -1}', *rows[3:]], "line 4 is no row with a step"),
        (lambda rows: rows[::-1], "goes back"),
        (lambda rows: [row for row in rows if "val_loss" not in row], "last step 100; it needs validation in --eval"),
        (lambda rows: rows[:-1], "no validation loss at its last step 100; go on with it by --resume auto"),
        (lambda rows: [row.replace("memory_bytes", "m") for row in rows], "no memory_bytes"),
        (lambda rows: [], "unfinished at step 0 of 100"),
    ],
)
def test_bad_rows_are_told(tmp_path, edit, words):
    edit_rows(write_run(tmp_path / "bad"), edit)
    assert words in told(tmp_path, "bad")


def test_a_last_line_that_a_crash_cut_short_is_left_out(tmp_path):
    run = write_run(tmp_path / "bad", until=50)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"schema": 1, "step": 60, "train_l')
    assert "unfinished at step 50 of 100" in told(tmp_path, "bad")


def test_a_run_whose_last_losses_are_not_finite_has_diverged(tmp_path):
    write_run(tmp_path / "bad", diverged_at=STEPS)
    assert told(tmp_path, "bad").startswith("diverged")


@pytest.mark.parametrize(
    "bad_step, diverged",
    [
        ({"step": 55, "skipped_in_a_row": 10, "updated": False}, True),
        ({"step": 55, "skipped_in_a_row": 9, "updated": False}, False),
        ({"step": 45, "skipped_in_a_row": 10, "updated": False}, False),
    ],
)
def test_a_run_that_its_health_guard_ended_has_diverged(tmp_path, bad_step, diverged):
    folder = write_run(tmp_path / "bad", until=50) / "forensics"
    folder.mkdir()
    (folder / f"step_{bad_step['step']:08d}.json").write_text(json.dumps({"schema": 1} | bad_step))
    assert told(tmp_path, "bad").startswith("diverged" if diverged else "unfinished")


@pytest.mark.parametrize(
    "outcome, words",
    [
        ("unhealthy", "diverged: its losses are not finite, or its health guard ended it, at step 57 of 100"),
        ("stopped by a signal", "unfinished at step 57 of 100"),
        (None, "unfinished at step 57 of 100"),
    ],
)
def test_a_run_is_what_it_says_of_its_end_whatever_forensics_were_kept(tmp_path, outcome, words):
    run = write_run(tmp_path / "bad", until=50)
    (run / "outcome.json").write_text(json.dumps({"schema": 1, "outcome": outcome, "step": 57}))
    if outcome != "unhealthy":
        (run / "forensics").mkdir()
        bad = {"schema": 1, "step": 60, "skipped_in_a_row": 10, "updated": False}
        (run / "forensics" / "step_00000060.json").write_text(json.dumps(bad))
    assert told(tmp_path, "bad").startswith(words)


def test_a_finished_run_says_so_and_counts(tmp_path):
    run = write_run(tmp_path / "a")
    (run / "outcome.json").write_text('{"schema": 1, "outcome": "finished", "step": 100}')
    assert [found.state for found in read_runs([tmp_path]).runs] == ["ended"]


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"schema": 1, "outcome": 3, "step": 5}', '{"schema": 2}'])
def test_a_damaged_record_of_the_end_is_named(tmp_path, text):
    (write_run(tmp_path / "bad") / "outcome.json").write_text(text)
    assert "outcome.json" in told(tmp_path, "bad")


@pytest.mark.parametrize("text", ["\x1b[2J", "\ud800", "a\nb", "\u202e"])
def test_no_text_of_a_run_moves_the_cursor(tmp_path, text):
    write_run(tmp_path / "a", residual="vanilla", loss=3.1, config={f"key {text}": text})
    write_run(tmp_path / "b", residual=text, metrics={f"{text}/acc": 0.5}, config={f"key {text}": "x"})
    write_run(tmp_path / "c\x1b[2J", residual="other", environment={"processor": text})
    found = compare([tmp_path], baseline="vanilla")
    assert all(text.isprintable() for text in texts(found.model_dump())) and len(found.variants) == 3
    found.model_dump_json()


def test_a_foreign_folder_is_told_and_a_report_is_not(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    (tmp_path / "a file").write_text("")
    assert "neither a run" in told(tmp_path, "pictures")
    assert [problem.run for problem in compare([tmp_path]).problems] == ["pictures"]


@pytest.mark.parametrize("denied", ["a", "b", "b/metrics.jsonl"])
def test_a_run_that_may_not_be_read_is_told_and_the_others_count(tmp_path, monkeypatch, denied):
    write_sweep(tmp_path / "x", {"vanilla": [3.0]})
    for name in "abc":
        (tmp_path / "x" / "runs" / name).mkdir() if name == denied else write_run(tmp_path / "x/runs" / name)
    refused, (stat, read) = tmp_path / "x/runs" / denied, (Path.stat, Path.read_bytes)

    def refusing(ask):
        def asked(path, **options):
            if refused in path.parents or path == refused and "." in denied:
                raise PermissionError(13, "Permission denied", str(path))
            return ask(path, **options)

        return asked

    monkeypatch.setattr(Path, "stat", refusing(stat))
    monkeypatch.setattr(Path, "read_bytes", refusing(read))
    found = read_runs([tmp_path / "x"])
    (problem,) = found.problems
    assert problem.run == f"runs/{denied[0]}" and problem.line.endswith("cannot be read: Permission denied")
    assert {run.name for run in found.runs} == {"runs/vanilla-0.001-1", *(f"runs/{n}" for n in "abc" if n != denied[0])}


def test_names_that_are_none_of_the_sweeps_are_passed_over(tmp_path):
    write_sweep(tmp_path, {"vanilla": [3.0]})
    tree = json.loads((tmp_path / "sweep.json").read_text())
    names = ["../a", "/a", "", ".", "..", "x" * 300, "a\0b"]
    tree["runs"] += [tree["runs"][0] | {"name": name} for name in names]
    (tmp_path / "sweep.json").write_text(json.dumps(tree))
    missing = [problem.run for problem in read_runs([tmp_path]).problems]
    assert missing == [f"runs/{'x' * 300}", "runs/a\\x00b"]


def test_calibration_runs_of_a_sweep_are_not_its_runs(tmp_path):
    write_sweep(tmp_path, {"vanilla": [3.0]})
    write_run(tmp_path / "calibration" / "vanilla", steps=20)
    assert [run.name for run in read_runs([tmp_path]).runs] == ["runs/vanilla-0.001-1"]


def test_a_damaged_sweep_is_told_and_its_runs_are_read(tmp_path):
    write_sweep(tmp_path, {"vanilla": [3.0]})
    (tmp_path / "sweep.json").write_text("{")
    assert "sweep.json is damaged" in line_on(tmp_path, "sweep.json") and len(read_runs([tmp_path]).runs) == 1


def test_a_run_is_read_once_however_often_it_is_named(tmp_path):
    run = write_run(tmp_path / "a")
    assert len(read_runs([tmp_path, run, run]).runs) == 1
    assert [found.name for found in read_runs([run]).runs] == ["a"]


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_path_that_is_no_folder_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{name}: there is no such folder"):
        read_runs([tmp_path / name])


def test_where_no_run_counts_the_reasons_are_told(tmp_path):
    write_run(tmp_path / "a", until=50)
    with pytest.raises(UserError, match="there is no run to compare: a: unfinished at step 50"):
        compare([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folders are empty"):
        compare([tmp_path / "empty"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = [10**400, -(10**400), 1e308, 1e-308, 5e-324, float("nan"), float("inf"), 2**63]
HUGE = st.sampled_from([*NUMBERS, "\x1b[2J", "\ud800", "<b>", ""])


def texts(tree):
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from texts(part)


@pytest.mark.parametrize("key", ["val_loss", "training_seconds", "tokens_per_second", "mfu", "memory_bytes", "x/acc"])
@pytest.mark.parametrize("values", [(1e99, 9e99), (1e-99, 9e-100), (1e-99, 1e99), (1e-320, 5e-324)])
def test_numbers_out_of_all_reason_leave_only_finite_ones(tmp_path, key, values):
    """Their squares, sums and quotients overflow, or vanish and are divided by."""
    write_sweep(tmp_path, {"vanilla": [3.0, 3.1, 3.05], "other": [2.9, 3.2, 3.0]}, every=50)
    for run, value in (("other-0.001-1", values[0]), ("other-0.001-2", values[1]), ("vanilla-0.001-1", values[1])):
        path = tmp_path / "runs" / run / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        last = [row for row in rows if key in row or "/" in key][-1]
        last[key] = value
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare([tmp_path])
    assert Comparison.model_validate_json(found.model_dump_json()) == found


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_in_a_run_directory_is_a_line_and_no_traceback(tmp_path, data):
    """A good sweep, of which one value of one file is another."""
    folder = tmp_path / "sweep"
    shutil.rmtree(folder, ignore_errors=True)
    write_sweep(folder, {"vanilla": [3.0, 3.1], "other": [2.9, 3.2]}, every=50)
    run = folder / "runs" / "other-0.001-1"
    name = data.draw(st.sampled_from([*FILES, "sweep.json"]))
    path = folder / name if name == "sweep.json" else run / name
    value = data.draw(JSON | HUGE)
    if name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        row = data.draw(st.sampled_from(rows))
        row[data.draw(st.sampled_from(sorted(row)))] = value
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        tree = json.loads(path.read_text())
        tree[data.draw(st.sampled_from(sorted(tree)))] = value
        path.write_text(json.dumps(tree))
    try:
        found = compare([folder])
    except UserError as error:
        assert str(error)
    else:
        assert Comparison.model_validate_json(found.model_dump_json()) == found
        assert any("vanilla" in variant.name for variant in found.variants)
        assert all(text.isprintable() for text in texts(found.model_dump()))
