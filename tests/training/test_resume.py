"""N steps, stop, M steps equal N + M steps, bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed
from gpt_runs import ADAMW, FUSED_ADAMW, SGD, configuration, micro_batches, start_engine

from megaresid.evaluation.validation import Validation
from megaresid.training.checkpoint import load_checkpoint, read_parameters, save_checkpoint
from megaresid.training.schedule import learning_rate

STOP, END = 3, 7


def run_steps(engine, config, first: int, last: int) -> list[tuple[float, float]]:
    """(this rank's own loss, gradient norm) of steps [first, last)."""
    source = micro_batches(config, engine.batch, torch.distributed.get_rank(), first)
    rate = [learning_rate(step, 20, config.optimizer) for step in range(last)]
    results = [engine.train_step(source, rate[step]) for step in range(first, last)]
    return [(result.loss.item(), result.gradient_norm) for result in results]


def checkpoint_of(engine, folder: Path, step: int) -> Path:
    return save_checkpoint(engine.deepspeed, engine.parameters, folder, step=step, counters={}, identity={})


def uninterrupted_and_resumed(stage: int, optimizer: dict, folder: str):
    """Runs on every rank: the last steps of both runs, and their final parameters."""
    config = configuration(dropout=0.1, micro_batch_size=2, steps=20)
    tree = {"optimizer": optimizer, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    root = Path(folder)

    torch.manual_seed(100 + torch.distributed.get_rank())
    engine = start_engine(config, tree, folder)
    torch.manual_seed(100 + torch.distributed.get_rank())
    run_steps(engine, config, 0, STOP)
    stopped = checkpoint_of(engine, root / "whole", STOP)
    expected = run_steps(engine, config, STOP, END)
    end = checkpoint_of(engine, root / "whole", END)
    engine.deepspeed.destroy()

    torch.manual_seed(999)  # whatever the generators were, the checkpoint's own count
    engine = start_engine(config, tree, folder)
    state = load_checkpoint(engine.deepspeed, engine.parameters, stopped)
    found = run_steps(engine, config, state.step, END)
    resumed_end = checkpoint_of(engine, root / "resumed", END)
    engine.deepspeed.destroy()
    return expected, found, read_parameters(end), read_parameters(resumed_end)


OTHERS = [(0, FUSED_ADAMW), (1, FUSED_ADAMW), (1, SGD)]


@pytest.mark.parametrize(
    "stage, optimizer",
    [(2, ADAMW), (3, FUSED_ADAMW), *(pytest.param(*other, marks=pytest.mark.full) for other in OTHERS)],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bitwise(stage, optimizer, ranks2, tmp_path):
    """On two ranks, with dropout (each rank its own generator), in the middle of the learning rate's course."""
    first, second = ranks2.run(uninterrupted_and_resumed, stage, optimizer, str(tmp_path))
    assert first[0] != second[0], "both ranks drew the same: one generator would do, and the test would not see it"
    for expected, found, end, resumed_end in (first, second):
        assert found == expected
        assert end.keys() == resumed_end.keys()
        for name, parameter in end.items():
            assert torch.equal(parameter, resumed_end[name]), name


def evaluated_and_not(folder: str):
    """Runs on every rank: losses with a validation after each step, and without."""
    config = configuration(dropout=0.1)
    tree = {"optimizer": ADAMW, "zero_optimization": {"stage": 3}}

    class Stream:
        def __len__(self):
            return 300

        def read_windows(self, windows, context):
            return (windows[:, None] + torch.arange(context + 1).numpy()) % 50

    found = []
    for evaluates in (False, True):
        engine = start_engine(config, tree, folder)
        torch.manual_seed(torch.distributed.get_rank())
        validation = Validation(Stream(), context=config.shape.context, tokens=300, vocab_size=300)
        losses = []
        for step in range(3):
            losses += run_steps(engine, config, step, step + 1)
            if evaluates:
                assert validation(engine)["val_loss"] > 0
        engine.deepspeed.destroy()
        found.append(losses)
    return found


def test_evaluation_changes_nothing_of_the_training_that_follows(ranks2, tmp_path):
    """ZeRO-3, where an evaluation gathers and frees every parameter; 12 windows do not divide by 2 x 4."""
    for without, with_evaluation in ranks2.run(evaluated_and_not, str(tmp_path)):
        assert without == with_evaluation
