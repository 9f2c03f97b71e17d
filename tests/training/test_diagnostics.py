"""Diagnostics while a model trains: they change nothing of it, and find what the plain model has."""

import contextlib
import functools
import math
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gpt_runs import FUSED_ADAMW, configuration, micro_batches, plan_of, sample, start_engine
from hooked_runs import Told

from megaresid.config import IntervalOptions
from megaresid.model.gpt import build, canonical_parameters, set_step
from megaresid.monitoring.findings import Findings
from megaresid.monitoring.probe import probe
from megaresid.readings import Values
from megaresid.training import diagnostics as diagnosing
from megaresid.training.checkpoint import read_parameters, save_checkpoint
from megaresid.training.diagnostics import Diagnostics, probe_tokens
from megaresid.training.loop import Course, train
from megaresid.training.run import _diagnostics
from megaresid.training.schedule import learning_rate

END = 4
IDX = torch.stack([sample(index, 23) for index in (1000, 1001)])
WIDE = {"residual": "hyper_connections", "attention": "gated_delta_net + softmax"}
STEPWISE = {"residual": "pro_res(warmup=3)"}


class Recorded(Told):
    def __init__(self):
        super().__init__()
        self.found, self.samples, self.figures = {}, {}, []

    def diagnosis(self, step, row, samples):
        self.found[step], self.samples[step] = row, samples

    def figure(self, name, figure, step):
        self.figures.append((step, name))


class Run:
    """To step END on every rank, looked at every ``interval`` steps."""

    def __init__(self, folder: str, stage: int, interval: int, broken=None, **options):
        rank = dist.get_rank()
        self.config = configuration(**{"micro_batch_size": 2, "steps": END} | options)
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        self.engine = start_engine(self.config, {"optimizer": FUSED_ADAMW, "zero_optimization": zero}, folder)
        torch.manual_seed(100 + rank)
        self.told = Recorded()
        diagnostics = Diagnostics(self.engine, IDX, interval, None if rank else self.told) if interval else None
        if broken:
            broken(diagnostics)

        course = Course(
            first=0,
            training_seconds=0.0,
            skipped_steps=0,
            steps=END,
            tokens_per_step=192,
            learning_rate=lambda step: learning_rate(step, END, self.config.optimizer),
            flops_per_token=1,
            peak_flops=None,
        )
        saved = {}

        def save(step, counters):
            saved[step] = save_checkpoint(
                self.engine.deepspeed,
                self.engine.parameters,
                Path(folder) / str(interval),
                step=step,
                counters=counters,
                identity={},
            )

        source, intervals = micro_batches(self.config, self.engine.batch, rank), IntervalOptions(log_interval=1)
        self.outcome = train(self.engine, source, course, intervals, (), save, self.told, diagnostics=diagnostics)
        self.hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.engine.model.modules())
        self.end = read_parameters(saved[END])
        self.engine.deepspeed.destroy()

    def training(self) -> list[tuple]:
        return self.told.named("train_loss", "gradient_norm")


def plain_numbers(run: Run) -> dict[str, float]:
    """Of a model that holds the parameters at the end."""
    model = build(plan_of(run.config), seed=0)
    with torch.no_grad():
        for name, parameter in canonical_parameters(model, model.prefixes).items():
            parameter.copy_(run.end[name])
    set_step(model, END)
    return probe(model.eval(), IDX).numbers()


def without_and_with(folder: str, stage: int, options: dict):
    """Runs on every rank."""
    without, looked_at = Run(folder, stage, 0, **options), Run(folder, stage, 2, **options)
    told, plain = looked_at.told, plain_numbers(looked_at)
    assert without.told.found == {}, "there are no diagnostics, and they found something"
    assert without.hooks == looked_at.hooks, "a hook was left on the model that trains"
    return (without.training(), without.end), (looked_at.training(), looked_at.end), (told.found, told.figures), plain


def assert_undisturbed(answers) -> None:
    for (training, end), (with_training, with_end), _, _ in answers:
        assert [step for step, *_ in training] == list(range(1, END + 1))
        assert with_training == training
        assert end.keys() == with_end.keys()
        for name, parameter in end.items():
            assert torch.equal(parameter, with_end[name]), name


def assert_found(answers) -> None:
    _, (training, _), (found, figures), plain = answers[0]
    assert list(found) == [2, END], "of the steps that are due, and of no others"
    norms = {step: norm for step, _, norm in training}
    for step, row in found.items():
        gradients = [value for name, value in row.items() if name.startswith("diagnostics/gradient_norm/")]
        assert math.hypot(*gradients) == pytest.approx(norms[step], rel=1e-4)
    assert plain.keys() == {
        name for name in found[END] if "gradient_norm" not in name and name != "diagnostics/seconds"
    }
    for name, value in plain.items():
        assert found[END][name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    assert found[2]["diagnostics/update_rms/00.mlp"] != found[END]["diagnostics/update_rms/00.mlp"]
    assert (2, "diagnostics/by_depth") in figures
    assert all(not found for _, _, (found, _), _ in answers[1:]), "rank 0 alone records"


@pytest.mark.parametrize(
    "stage, options",
    [
        (0, STEPWISE),
        (3, WIDE),
        pytest.param(1, WIDE | {"activation_checkpointing": True}, marks=pytest.mark.full),
        pytest.param(2, STEPWISE, marks=pytest.mark.full),
        pytest.param(3, {"residual": "attention_residuals", "activation_checkpointing": True}, marks=pytest.mark.full),
        pytest.param(3, {"residual": "mhc", "attention": "kda"}, marks=pytest.mark.full),
        pytest.param(3, {"residual": "shared_token_gate"}, marks=pytest.mark.full),
    ],
)
def test_they_change_nothing_and_find_what_the_plain_model_has(stage, options, ranks2, tmp_path):
    """On two ranks, with dropout in training."""
    answers = ranks2.run(without_and_with, str(tmp_path), stage, options | {"dropout": 0.1}, timeout=300)
    assert_undisturbed(answers)
    assert_found(answers)


def compiled_without_and_with(folder: str):
    """Runs on the one rank. The graphs are dynamo's; what runs them is no matter here, and inductor takes a minute."""
    torch._dynamo.reset()
    eagerly = functools.partial(torch.compile, backend="aot_eager")
    with mock.patch("megaresid.model.compile.torch.compile", eagerly):
        return without_and_with(folder, 1, STEPWISE | {"compile": True, "dropout": 0.1})


@pytest.mark.full
def test_a_compiled_model_is_looked_at_uncompiled(ranks1, tmp_path):
    answers = ranks1.run(compiled_without_and_with, str(tmp_path), timeout=300)
    assert_undisturbed(answers)
    assert_found(answers)


def gradients_of_the_first_step(folder: str, stage: int):
    """Runs on every rank: the norms that diagnostics found, and those of one plain backward pass."""
    run = Run(folder, stage, 1)
    model = build(plan_of(run.config), run.config.run.seed)
    tokens = torch.stack([sample(index, run.config.shape.context) for index in range(8)])
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    squares = {}
    for name, parameter in canonical_parameters(model, model.prefixes).items():
        first, second, *_ = name.split(".")
        place = second if first == "layers" else first
        squares[place] = squares.get(place, 0.0) + parameter.grad.double().square().sum().item()
    return run.told.found.get(1), {place: math.sqrt(square) for place, square in squares.items()}


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.full)])
def test_gradient_norms_are_those_of_the_step(stage, ranks2, tmp_path):
    (found, plain), _ = ranks2.run(gradients_of_the_first_step, str(tmp_path), stage, timeout=300)
    of_diagnostics = {
        name.removeprefix("diagnostics/gradient_norm/"): value
        for name, value in found.items()
        if "/gradient_norm/" in name
    }
    assert of_diagnostics == pytest.approx(plain, rel=1e-4)


def break_a_reading(diagnostics):
    def fail(state):
        raise ZeroDivisionError("of my own")

    diagnostics._model.parts[2].sites["mlp"].diagnose = fail


def fail_in_the_midst(folder: str, stage: int, rank: int):
    """Runs on every rank."""
    run = Run(folder, stage, 1, break_a_reading if dist.get_rank() == rank else None, dropout=0.1)
    return run.told.lines, run.told.found, run.training()


@pytest.mark.parametrize(
    "stage, rank, reason",
    [(1, 0, "ZeroDivisionError: of my own"), pytest.param(3, 1, "on another rank", marks=pytest.mark.full)],
)
def test_diagnostics_that_fail_on_a_rank_are_off_and_the_run_goes_on(stage, rank, reason, ranks2, tmp_path):
    answers = ranks2.run(fail_in_the_midst, str(tmp_path), stage, rank, timeout=300)
    lines, found, _ = answers[0]
    (told,) = [line for line in lines if "diagnostics" in line]
    assert told == f"diagnostics failed and are off from here on: {reason}" and found == {}
    assert all(len(training) == END for *_, training in answers)


@pytest.fixture
def alone(monkeypatch):
    """Diagnostics of an engine that is none, on one rank, whose probe finds nothing."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(diagnosing, "mirror", lambda model: model)
    found = Diagnostics(mock.Mock(device="cpu"), IDX, 1, mock.Mock())
    found._probe = Findings
    return found


def test_a_reading_that_disturbs_is_undone(monkeypatch):
    """And it runs in evaluation mode, without gradients, under the run's autocast."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(diagnosing, "autocast_if_enabled", lambda _: torch.autocast("cpu", torch.bfloat16))
    model = build(plan_of(configuration()), seed=0)
    engine = mock.Mock(model=model, device=torch.device("cpu"), whole=lambda _: contextlib.nullcontext())
    recorder = mock.Mock()
    diagnostics = Diagnostics(engine, IDX, 1, recorder)

    def disturb(state):
        torch.set_float32_matmul_precision("medium")
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled() and not diagnostics._model.training
        return {"gate": Values(torch.rand(1) + float(np.random.rand()) + random.random())}

    diagnostics._model.parts[2].sites["mlp"].diagnose = disturb
    states = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
    precision = torch.get_float32_matmul_precision()
    diagnostics.run(1)
    assert "diagnostics/site.gate/00.mlp" in recorder.diagnosis.call_args.args[1]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [np.random.get_state()[1].tolist(), random.getstate()] == states[1:]
    assert torch.get_float32_matmul_precision() == precision
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


class Clock:
    stopped = False

    def __enter__(self):
        self.stopped = True

    def __exit__(self, *_):
        self.stopped = False


def test_gradients_are_looked_at_outside_of_the_time_that_is_trained(alone, monkeypatch):
    clock, asked = Clock(), []
    norms = lambda *_: {"layers.03.weight": (1.0, 2.0 if clock.stopped else math.nan)}  # noqa: E731
    monkeypatch.setattr(diagnosing, "parameter_and_gradient_norms", norms)
    accepts = alone.noting(lambda *numbers: asked.append((*numbers, clock.stopped)) or "yes", clock)
    assert accepts(0.5, 0.25) == "yes" and asked == [(0.5, 0.25, False)]
    alone.run(1)
    (_, row, _), _ = alone._recorder.diagnosis.call_args
    assert row["diagnostics/gradient_norm/03"] == 2.0


def test_what_cannot_be_recorded_is_told_and_the_run_goes_on(alone):
    alone._recorder.diagnosis.side_effect = ValueError("no such\nnumber")
    alone.run(4)
    alone._recorder.say.assert_called_once_with(
        "step 4: diagnostics could not be recorded or drawn: ValueError: no such number"
    )
    assert alone.due(5)


def test_figures_cost_little_of_the_time(alone):
    found = Findings(samples={"site.gate": {"00.mlp": np.array([1.0]), "01.mlp": np.array([2.0])}})
    found.note("read_rms", "00.mlp", 1.0)
    alone._probe = lambda: found
    for step in range(1, 5):
        alone.run(step)
    assert {step for _, _, step in figures_of(alone)} == {1}, "the next only after a hundred times as long"
    alone._since -= 1e6
    alone.run(5)
    assert {step for _, _, step in figures_of(alone)} == {1, 5}
    samples = alone._recorder.diagnosis.call_args.args[2]
    assert samples["diagnostics/site.gate"].tolist() == [1.0, 2.0]


def figures_of(diagnostics):
    return [call.args for call in diagnostics._recorder.figure.call_args_list]


class Data:
    """A validation split of so many tokens, and training tokens of 7 alone."""

    def __init__(self, validation):
        self._validation = validation

    def validation(self, context, tokens):
        return None if self._validation is None else Tokens(np.arange(self._validation))

    def training(self, context):
        return Tokens(np.full(1000, 7))


class Tokens:
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def read_windows(self, windows, context):
        return self.ids[windows[:, None] * context + np.arange(context + 1)]


def test_the_tokens_are_the_first_of_the_validation_split_or_of_training():
    shape = configuration().shape
    assert torch.equal(probe_tokens(Data(100), shape), torch.arange(2 * shape.context).reshape(2, -1))
    assert torch.equal(probe_tokens(Data(30), shape), torch.arange(shape.context)[None])
    for none in (None, 10):
        assert torch.equal(probe_tokens(Data(none), shape), torch.full((2, shape.context), 7))


def test_off_is_nothing_at_all_and_in_a_pipeline_that_is_said():
    told = Told()
    off = mock.Mock(config=configuration(diagnose_interval=0))
    assert _diagnostics(None, off, told) is None and told.lines == []
    pipeline = mock.Mock(config=configuration(pipeline_stages=2))
    assert _diagnostics(None, pipeline, told) is None
    (line,) = told.lines
    assert "not in a pipeline" in line
