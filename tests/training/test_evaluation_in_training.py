"""Evaluation changes nothing of the training that follows it, whatever the hooks do."""

import pytest
import torch
from hooked_runs import END, MANY, Run


def without_and_with_hooks(folder: str, stage: int, options: dict):
    """Runs on every rank."""
    without = Run(folder, "without", stage, **options)
    hooked = Run(folder, "with", stage, MANY, **options)
    assert without.error is None and hooked.error is None, (without.error, hooked.error)
    return without.training(), hooked.training(), without.end(), hooked.end(), hooked.told


def assert_same_training(answers) -> None:
    for without, hooked, end, hooked_end, told in answers:
        assert [step for step, *_ in without] == list(range(1, END + 1))
        assert hooked == without
        assert end.keys() == hooked_end.keys()
        for name, parameter in end.items():
            assert torch.equal(parameter, hooked_end[name]), name
        every_step = list(range(END + 1))
        assert [step for step, _ in told.named("val_loss")] == every_step
        assert [step for step, _ in told.named("nats")] == every_step
        assert [step for step, _ in told.named("drawn0")] == [0, 2, 4]
        assert [step for step, _ in told.named("failed")] == every_step


# A residual that depends on the step, so that its buffers count.
STEPWISE = {"residual": "pro_res(warmup=3)"}


@pytest.mark.parametrize(
    "stage, options",
    [
        (0, STEPWISE),
        (1, STEPWISE | {"activation_checkpointing": True}),
        (3, STEPWISE),
        pytest.param(3, STEPWISE | {"activation_checkpointing": True}, marks=pytest.mark.full),
        pytest.param(2, {"attention": "gated_delta_net + softmax"}, marks=pytest.mark.full),
    ],
)
def test_the_training_is_bitwise_that_without_hooks(stage, options, ranks2, tmp_path):
    """On two ranks, with dropout: a validation, scores of many shapes, a hook that draws random numbers and leaves
    everything in another state, and one that raises, all after each step and before the first."""
    assert_same_training(ranks2.run(without_and_with_hooks, str(tmp_path), stage, options))


@pytest.mark.full
def test_the_training_of_a_compiled_model_is_bitwise_that_without_hooks(ranks1, tmp_path):
    options = STEPWISE | {"compile": True}
    assert_same_training(ranks1.run(without_and_with_hooks, str(tmp_path), 1, options, timeout=600))
