"""What a run tells: metrics.jsonl, TensorBoard and the lines on the screen."""

import json
import resource

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaresid.monitoring.metrics import Recorder, peak_memory_bytes
from megaresid.training.run_dir import RunDirectory, read_metrics

ROW = {
    "train_loss": 5.25,
    "learning_rate": 1e-3,
    "gradient_norm": 0.5,
    "tokens_per_second": 1234.0,
    "mfu": None,
    "memory_bytes": 2**30,
}


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rows_reach_the_file_and_tensorboard_and_unknown_numbers_no_plot(tmp_path):
    with Recorder(tmp_path, first_step=0, steps=20) as recorder:
        recorder.record(10, ROW)
        recorder.record(20, {"val_loss": 5.0})
    rows = read_metrics(tmp_path)
    assert rows == [{"schema": 1, "step": 10, **ROW}, {"schema": 1, "step": 20, "val_loss": 5.0}]
    found = scalars(tmp_path / "tensorboard")
    assert found["loss/train"] == [(10, 5.25)] and found["loss/validation"] == [(20, 5.0)]
    assert found["speed/tokens_per_second"] == [(10, 1234.0)] and "speed/mfu" not in found


def test_the_lines_name_what_is_not_known(tmp_path, capsys):
    with Recorder(tmp_path, first_step=0, steps=20) as recorder:
        recorder.progress_line(10, ROW)
        recorder.evaluation_line(10, {"train_loss": 5.25, "val_loss": 5.5})
        recorder.evaluation_line(0, {"train_loss": None, "val_loss": 10.8})
    first, second, third = capsys.readouterr().out.strip().splitlines()
    assert "step 10/20" in first and "MFU n/a" in first and "1.00 GiB" in first and "1,234 tokens/s" in first
    assert second == "TRAIN_METRICS: step=10, train_loss=5.250000, val_loss=5.500000"
    assert third == "TRAIN_METRICS: step=0, train_loss=nan, val_loss=10.800000"


def test_the_numbers_of_an_evaluation_are_plotted_and_printed_without_their_errors_and_costs(tmp_path, capsys):
    found = {"val_loss": 5.0, "val_bits_per_byte": 2.0, "arc_easy/acc": 0.5, "arc_easy/acc_stderr": 0.1}
    with Recorder(tmp_path, first_step=0, steps=20) as recorder:
        recorder.record(10, found | {"seconds/arc_easy": 3.0})
        recorder.evaluation_line(10, {"train_loss": 5.25, **found, "seconds/arc_easy": 3.0})
    said = "step=10, train_loss=5.250000, val_loss=5.000000, val_bits_per_byte=2.000000, arc_easy/acc=0.500000"
    assert capsys.readouterr().out.strip() == f"TRAIN_METRICS: {said}"
    assert scalars(tmp_path / "tensorboard") == {
        "loss/validation": [(10, 5.0)],
        "loss/validation_bits_per_byte": [(10, 2.0)],
        "evaluation/arc_easy/acc": [(10, 0.5)],
        "evaluation/arc_easy/acc_stderr": [(10, pytest.approx(0.1))],
        "evaluation/seconds/arc_easy": [(10, 3.0)],
    }


def test_a_failure_is_kept_beside_the_numbers(tmp_path):
    with Recorder(tmp_path, first_step=0, steps=20) as recorder:
        recorder.record(10, {"tokens": 5}, {"mine:own": "no luck"})
    assert read_metrics(tmp_path) == [{"schema": 1, "step": 10, "tokens": 5, "failed": {"mine:own": "no luck"}}]


def test_a_resumed_run_replaces_the_rows_after_its_checkpoint(tmp_path):
    with Recorder(tmp_path, first_step=0, steps=30) as recorder:
        for step in (10, 20, 30):
            recorder.record(step, {"train_loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"schema": 1, "step": 4')  # cut short by a crash
    RunDirectory(tmp_path).keep_metrics_until(10)
    with Recorder(tmp_path, first_step=10, steps=30) as recorder:
        recorder.record(20, {"train_loss": 0.0})
    assert [(row["step"], row["train_loss"]) for row in read_metrics(tmp_path)] == [(10, 10.0), (20, 0.0)]
    assert scalars(tmp_path / "tensorboard")["loss/train"] == [(10, 10.0), (20, 0.0)]


def test_what_is_not_finite_is_null_in_the_file_and_in_no_plot(tmp_path):
    with Recorder(tmp_path, first_step=0, steps=20) as recorder:
        recorder.record(10, {"train_loss": float("nan"), "gradient_norm": float("inf"), "learning_rate": 1.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["train_loss"] is None
    assert scalars(tmp_path / "tensorboard") == {"optimizer/learning_rate": [(10, 1.0)]}


def test_a_run_that_begins_anew_in_its_directory_hides_the_first_attempt(tmp_path):
    """Killed before its first checkpoint, and started again with --resume auto."""
    for attempt in (1.0, 2.0):
        RunDirectory(tmp_path).keep_metrics_until(0)
        with Recorder(tmp_path, first_step=0, steps=20) as recorder:
            recorder.record(0, {"val_loss": attempt})
            recorder.record(10, {"val_loss": attempt})
    assert [row["val_loss"] for row in read_metrics(tmp_path)] == [2.0, 2.0]
    assert scalars(tmp_path / "tensorboard")["loss/validation"] == [(0, 2.0), (10, 2.0)]


def test_every_line_of_the_file_is_json_at_once(tmp_path):
    """A killed run keeps what it knew: nothing waits in a buffer."""
    recorder = Recorder(tmp_path, first_step=0, steps=20)
    recorder.record(10, ROW)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train_loss"] == 5.25


def test_memory_is_counted_in_bytes():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(300 * 2**20, dtype=torch.uint8)
    grown = peak_memory_bytes(torch.device("cpu")) - before
    assert held[-1] and grown <= 400 * 2**20
    assert peak_memory_bytes(torch.device("cpu")) > 300 * 2**20


def test_a_full_disk_is_told_once_and_no_row_of_the_file_is_lost(tmp_path, capsys):
    """The limit on a file's size stands for the disk's: writing beyond it fails, and later goes on."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Recorder(tmp_path, first_step=0, steps=20) as recorder:
        recorder.record(1, ROW)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, most))
        try:
            recorder.record(2, ROW)
            recorder.record(3, ROW)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        recorder.record(4, ROW)
    assert read_metrics(tmp_path) == [{"schema": 1, "step": step, **ROW} for step in (1, 2, 3, 4)]
    assert capsys.readouterr().out.count("metrics cannot be written") == 1


def test_diagnostics_are_numbers_histograms_and_a_chart_for_each_quantity(tmp_path):
    row = {"diagnostics/effective_depth": 3.0, "diagnostics/cosine/00": 0.5, "diagnostics/cosine/01": float("nan")}
    samples = {"diagnostics/site.gate": np.array([1.0, np.nan, 3.0]), "diagnostics/none": np.array([np.inf])}
    figure = Figure(figsize=(2, 1), dpi=50)
    with Recorder(tmp_path, first_step=0, steps=20) as recorder:
        recorder.diagnosis(10, row, samples)
        recorder.figure("diagnostics/by_depth", figure, 10)
    assert read_metrics(tmp_path) == [{"schema": 1, "step": 10, **row, "diagnostics/cosine/01": None}]
    assert scalars(tmp_path / "tensorboard") == {
        "diagnostics/effective_depth": [(10, 3.0)],
        "diagnostics/cosine/00": [(10, 0.5)],
    }
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["histograms"] == ["diagnostics/site.gate"]
    (histogram,) = events.Histograms("diagnostics/site.gate")
    assert histogram.step == 10 and histogram.histogram_value.num == 2 and histogram.histogram_value.sum == 4
    (image,) = events.Images("diagnostics/by_depth")
    assert (image.step, image.width, image.height) == (10, 100, 50)
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert rb"diagnostics/cosine/.*" in layout and b"effective_depth" not in layout
