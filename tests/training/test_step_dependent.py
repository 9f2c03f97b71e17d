"""What depends on the optimizer step, in the training loop: one value a step, in evaluation and after a resume too."""

from pathlib import Path

import torch
import torch.distributed
from gpt_runs import ADAMW, configuration, micro_batches, start_engine

from megaresid.config import IntervalOptions
from megaresid.evaluation.hook import Hook
from megaresid.training.checkpoint import load_checkpoint, read_parameters, save_checkpoint
from megaresid.training.loop import Course, train
from megaresid.training.schedule import learning_rate

STOP, END, WARMUP = 3, 6, 4
IDX = torch.arange(24).reshape(1, 24) % 13


class Run:
    """An engine with a residual warm-up under the real loop. ``forwards`` are (whether in training, the multipliers of
    the four sites) of every forward; ``losses`` are those of the validation after each step."""

    def __init__(self, stage: int, micro_batch: int, folder: str):
        residual = f"pro_res(warmup={WARMUP})"
        self.config = configuration(residual=residual, dropout=0.1, micro_batch_size=micro_batch, steps=20)
        torch.manual_seed(100 + torch.distributed.get_rank())
        self.engine = start_engine(self.config, {"optimizer": ADAMW, "zero_optimization": {"stage": stage}}, folder)
        torch.manual_seed(100 + torch.distributed.get_rank())
        self.forwards, self.losses = [], []
        self.engine.deepspeed.module.register_forward_pre_hook(self._watch)

    def _watch(self, module, inputs):
        multipliers = [buffer.item() for name, buffer in module.named_buffers() if name.endswith("alpha")]
        self.forwards.append((module.training, multipliers))

    def _validate(self, engine) -> dict[str, float]:
        self.losses.append(engine.loss(IDX, IDX + 1).item())
        return {"val_loss": self.losses[-1]}

    def train(self, first: int, folder: Path) -> None:
        """To END, with a checkpoint in ``folder`` every STOP steps."""
        batch, rank = self.engine.batch, torch.distributed.get_rank()
        course = Course(
            first=first,
            training_seconds=0.0,
            skipped_steps=0,
            steps=END,
            tokens_per_step=batch.sequences * self.config.shape.context,
            learning_rate=lambda step: learning_rate(step, 20, self.config.optimizer),
            flops_per_token=1,
            peak_flops=None,
            pending=["validation"] if first == 0 else (),
        )

        def save(step: int, counters: dict[str, float]) -> None:
            save_checkpoint(
                self.engine.deepspeed, self.engine.parameters, folder, step=step, counters=counters, identity={}
            )

        intervals = IntervalOptions(log_interval=0, checkpoint_interval=STOP)
        hooks = [Hook("validation", 1, self._validate)]
        source = micro_batches(self.config, batch, rank, first)
        train(self.engine, source, course, intervals, hooks, save, recorder=None)
        self.engine.deepspeed.destroy()


def multipliers(step: int) -> list[float]:
    """min(t / (T l), 1) of the sites of layers 1, 1, 2, 2."""
    return [min(step / (WARMUP * layer), 1) for layer in (1, 1, 2, 2)]


def whole_and_resumed(stage: int, folder: str):
    """Runs on every rank."""
    whole = Run(stage, 2, folder)
    whole.train(0, Path(folder) / "whole")
    resumed = Run(stage, 2, folder)
    torch.manual_seed(999)
    state = load_checkpoint(
        resumed.engine.deepspeed, resumed.engine.parameters, Path(folder) / "whole" / f"step_{STOP:08d}"
    )
    resumed.train(state.step, Path(folder) / "resumed")
    return [(run.forwards, run.losses) for run in (whole, resumed)]


def test_a_run_resumed_within_the_warm_up_repeats_the_uninterrupted_one_bitwise(ranks2, tmp_path):
    for (forwards, losses), (resumed_forwards, resumed_losses) in ranks2.run(whole_and_resumed, 2, str(tmp_path)):
        per_step = 2 + 1  # micro-batches and the validation
        assert 0 < multipliers(STOP)[0] < 1
        assert resumed_forwards == forwards[1 + per_step * STOP :]
        assert resumed_losses == losses[1 + STOP :]
    end = f"step_{END:08d}"
    expected, found = (read_parameters(tmp_path / name / end) for name in ("whole", "resumed"))
    assert expected.keys() == found.keys()
    for name, parameter in expected.items():
        assert torch.equal(parameter, found[name]), name


def forwards_of(micro_batch: int, folder: str) -> list[tuple[bool, list[float]]]:
    """Runs on the one rank."""
    run = Run(0, micro_batch, folder)
    run.train(0, Path(folder) / f"micro_batch_{micro_batch}")
    return run.forwards


def test_accumulation_does_not_speed_the_warm_up_up_and_a_validation_sees_the_same_value(ranks1, tmp_path):
    """Of the global batch of 8 in one forward and in four, with a validation before the first and after every step."""
    for micro_batch in (8, 2):
        (forwards,) = ranks1.run(forwards_of, micro_batch, str(tmp_path))
        accumulation = 8 // micro_batch
        expected = [(False, multipliers(0))]
        for step in range(1, END + 1):
            expected += [(True, multipliers(step))] * accumulation + [(False, multipliers(step))]
        assert forwards == expected
