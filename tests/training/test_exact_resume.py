"""A resume is exact where several things that could disturb it come together, and reads no pickle."""

import pickle
from pathlib import Path
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed
from engines import equal, full_state, make_engine, train
from gpt_runs import FUSED_ADAMW, configuration, micro_batches, start_engine
from hooked_runs import validation

from megaresid.evaluation.hook import Hook
from megaresid.evaluation.running import Hooks
from megaresid.training.checkpoint import load_checkpoint, read_parameters, save_checkpoint
from megaresid.training.schedule import learning_rate

STOP, END = 2, 4


def draws(engine) -> dict[str, float]:
    """A user's hook that uses up random numbers."""
    return {"drawn": torch.rand(()).item()}


class Stretch:
    """Of one engine on every rank: losses, norms, evaluations and generators, step by step."""

    def __init__(self, stage: int, residual: str, attention: str, folder: str):
        self.config = configuration(dropout=0.1, micro_batch_size=2, residual=residual, attention=attention)
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        self.engine = start_engine(self.config, {"optimizer": FUSED_ADAMW, "zero_optimization": zero}, folder)
        self.hooks = Hooks([Hook("validation", 1, validation), Hook("draws", 1, draws)])

    def evaluate(self, step: int) -> list[float]:
        found = []
        for hook in self.hooks.due(step, END):
            numbers, failure = self.hooks.run(hook, self.engine, print)
            assert failure is None, failure
            found += [number for name, number in numbers.items() if not name.startswith("seconds/")]
        return found

    def run(self, first: int, last: int) -> list[tuple]:
        """Each step: its learning rate, the step, an evaluation."""
        source = micro_batches(self.config, self.engine.batch, torch.distributed.get_rank(), first)
        course = []
        for step in range(first, last):
            self.engine.set_step(step + 1)
            result = self.engine.train_step(source, learning_rate(step, 20, self.config.optimizer))
            course.append((result.loss.item(), result.gradient_norm, *self.evaluate(step + 1)))
            course.append(torch.get_rng_state().numpy().tobytes())
        return course

    def save(self, folder: Path, step: int) -> Path:
        engine = self.engine
        return save_checkpoint(engine.deepspeed, engine.parameters, folder, step=step, counters={}, identity={})


def straight_and_resumed(stage: int, residual: str, attention: str, folder: str):
    """Runs on every rank. The checkpoint is written before the evaluation of its step, which the resumed run makes up
    for, as the loop does."""
    root, rank = Path(folder), torch.distributed.get_rank()
    stretch = Stretch(stage, residual, attention, folder)
    torch.manual_seed(100 + rank)
    stretch.run(0, STOP - 1)
    source = micro_batches(stretch.config, stretch.engine.batch, rank, STOP - 1)
    stretch.engine.set_step(STOP)
    stretch.engine.train_step(source, learning_rate(STOP - 1, 20, stretch.config.optimizer))
    stopped = stretch.save(root / "whole", STOP)
    straight = [stretch.evaluate(STOP), *stretch.run(STOP, END)]
    ends = [read_parameters(stretch.save(root / "whole", END))]
    stretch.engine.deepspeed.destroy()

    torch.manual_seed(999)
    stretch = Stretch(stage, residual, attention, folder)
    state = load_checkpoint(stretch.engine.deepspeed, stretch.engine.parameters, stopped)
    stretch.engine.set_step(state.step)
    resumed = [stretch.evaluate(STOP), *stretch.run(STOP, END)]
    ends.append(read_parameters(stretch.save(root / "resumed", END)))
    stretch.engine.deepspeed.destroy()
    return straight, resumed, equal(*ends)


FULL = pytest.mark.full
CASES = [
    (0, "dense_former", "gated_delta_net + softmax"),
    (1, "hyper_connections(streams=2, dynamic=true)", "softmax"),
    (2, "attention_residuals", "gla"),
    (3, "layer_scale", "mamba2 + softmax"),
    pytest.param(3, "mudd_former", "softmax", marks=FULL),
    pytest.param(2, "siamese_norm", "delta_net", marks=FULL),
    pytest.param(1, "laurel_lr(rank=4)", "retention", marks=FULL),
    pytest.param(0, "deep_delta", "kda", marks=FULL),
    pytest.param(1, "x0_blend", "linear_attention", marks=FULL),
    pytest.param(2, "token_gate", "hgrn2", marks=FULL),
    pytest.param(3, "sandwich", "value_residual", marks=FULL),
]


@pytest.mark.parametrize("stage, residual, attention", CASES)
def test_with_dropout_across_evaluations_on_both_ranks(stage, residual, attention, ranks2, tmp_path):
    first, second = ranks2.run(straight_and_resumed, stage, residual, attention, str(tmp_path))
    for straight, resumed, same_end in (first, second):
        assert resumed == straight
        assert same_end
    assert first[0] != second[0], "both ranks drew the same: one generator would do, and the test would not see it"


def saved_and_loaded(folder: str):
    """Runs on the rank, with every loader of pickles, and DeepSpeed's own, made to raise."""
    called = AssertionError("a pickle is read or written")
    engine_class = deepspeed.DeepSpeedEngine
    forbidden = [(engine_class, "load_checkpoint"), (engine_class, "save_checkpoint"), (torch, "load"), (torch, "save")]
    forbidden += [(engine_class, "_load_checkpoint"), (torch.serialization, "load"), (pickle, "load"), (pickle, "dump")]
    patches = [mock.patch.object(owner, name, side_effect=called) for owner, name in forbidden]
    for patch in patches:
        patch.start()
    try:
        engine, parameters = make_engine(1)
        train(engine, range(2))
        path = save_checkpoint(engine, parameters, Path(folder), step=2, counters={}, identity={})
        state = full_state(engine, parameters)
        engine.destroy()
        engine, parameters = make_engine(1, seed=1)
        load_checkpoint(engine, parameters, path)
        same = equal(full_state(engine, parameters), state)
        engine.destroy()
    finally:
        for patch in patches:
            patch.stop()
    return same, [file.read_bytes()[:64] for file in path.iterdir()]


def test_a_resume_calls_no_loader_of_pickles_and_not_deepspeeds(ranks1, tmp_path):
    ((same, heads),) = ranks1.run(saved_and_loaded, str(tmp_path))
    assert same
    for head in heads:  # neither a pickle nor torch's zip of one
        assert not head.startswith((b"\x80", b"PK"))
