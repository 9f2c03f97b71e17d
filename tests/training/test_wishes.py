"""Wishes of one rank become all ranks', between two steps; a signal's save and end in the loop."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from gpt_runs import FUSED_ADAMW, configuration, micro_batches, start_engine
from hooked_runs import Told

from megaresid.config import IntervalOptions
from megaresid.evaluation.hook import Hook
from megaresid.training.loop import Course, Outcome, train
from megaresid.training.signals import Wish, Wishes

END = 4


def agreed_of(which: list[int], rank_of_signal: int) -> list:
    """On every rank: answers before, at and after the signals that one rank gets."""
    wishes = Wishes()
    with wishes.listening():
        answers = [wishes.agreed(), wishes.agreed_to_stop()]
        if dist.get_rank() == rank_of_signal:
            for number in which:
                signal.raise_signal(number)
        return [*answers, wishes.agreed_to_stop(), wishes.agreed(), wishes.agreed(), wishes.agreed_to_stop()]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "numbers, stops, then",
    [
        ([], False, [Wish.NONE, Wish.NONE]),
        ([signal.SIGUSR1], False, [Wish.SAVE, Wish.NONE]),  # once
        ([signal.SIGTERM], True, [Wish.STOP, Wish.STOP]),
        ([signal.SIGINT], True, [Wish.STOP, Wish.STOP]),
        ([signal.SIGUSR1, signal.SIGTERM], True, [Wish.STOP, Wish.STOP]),
    ],
)
def test_one_ranks_wish_is_all_ranks(ranks2, rank, numbers, stops, then):
    answers = [Wish.NONE, False, stops, *then, stops]
    assert ranks2.run(agreed_of, numbers, rank) == [answers, answers]


class Signalled:
    """Raises signals on rank 1 in the midst of its steps, and of its evaluations."""

    def __init__(self, in_steps: dict[int, int], in_hook: dict[int, int]):
        self._in_steps, self._in_hook = in_steps, in_hook
        self._calls = 0

    def batches(self, source, accumulation: int):
        for count, batch in enumerate(source):
            if count % accumulation == 0:
                self._raise(self._in_steps, count // accumulation + 1)
            yield batch

    def measure(self, engine) -> dict[str, float]:
        self._calls += 1
        self._raise(self._in_hook, self._calls)
        return {"calls": float(self._calls)}

    def second(self, engine) -> dict[str, float]:
        return {"second": 1.0}

    def _raise(self, when: dict[int, int], now: int) -> None:
        if dist.get_rank() == 1 and now in when:
            signal.raise_signal(when[now])


def course_of(folder: str, in_steps: dict, in_hook: dict, interval: int) -> tuple:
    """On every rank: how it ended, which steps were saved and made, and what was measured."""
    config = configuration(micro_batch_size=2, steps=END)
    engine = start_engine(config, {"optimizer": FUSED_ADAMW, "zero_optimization": {"stage": 1}}, folder)
    signalled, saved, told, wishes = Signalled(in_steps, in_hook), [], Told(), Wishes()
    hooks = [Hook("first", 2, signalled.measure), Hook("second", 2, signalled.second)]
    course = Course(
        first=0,
        training_seconds=0.0,
        skipped_steps=0,
        steps=END,
        tokens_per_step=192,
        learning_rate=lambda step: 1e-3,
        flops_per_token=1,
        peak_flops=None,
        pending=["first", "second"],
    )
    source = signalled.batches(micro_batches(config, engine.batch, dist.get_rank()), engine.batch.accumulation)
    with wishes.listening():
        outcome = train(
            engine,
            source,
            course,
            IntervalOptions(log_interval=1, checkpoint_interval=interval),
            hooks,
            lambda step, counters: saved.append(step),
            told,
            wishes=wishes,
        )
    engine.deepspeed.destroy()
    made = [step for step, _ in told.named("train_loss")]
    return outcome, saved, made, [[at for at, _ in told.named(name)] for name in ("calls", "second")]


ALL = [1, 2, 3, 4]


@pytest.mark.parametrize(
    "in_steps, in_hook, interval, expected",
    [
        ({}, {}, 0, (Outcome.FINISHED, [], ALL, [[0, 2, 4], [0, 2, 4]])),
        ({3: signal.SIGUSR1}, {}, 0, (Outcome.FINISHED, [3], ALL, [[0, 2, 4], [0, 2, 4]])),
        ({3: signal.SIGTERM}, {}, 0, (Outcome.STOPPED, [3], ALL[:3], [[0, 2], [0, 2]])),
        # Due at the step that it came in: saved once, evaluated by the run that goes on.
        ({2: signal.SIGTERM}, {}, 2, (Outcome.STOPPED, [2], ALL[:2], [[0], [0]])),
        ({4: signal.SIGTERM}, {}, 4, (Outcome.STOPPED, [4], ALL, [[0, 2], [0, 2]])),
        # In an evaluation: before the second one, with the state that it was of.
        ({}, {2: signal.SIGINT}, 0, (Outcome.STOPPED, [2], ALL[:2], [[0, 2], [0]])),
        ({}, {2: signal.SIGINT}, 2, (Outcome.STOPPED, [2], ALL[:2], [[0, 2], [0]])),
        ({}, {2: signal.SIGUSR1}, 0, (Outcome.FINISHED, [3], ALL, [[0, 2, 4], [0, 2, 4]])),
        # Before the first step there is nothing to save.
        ({}, {1: signal.SIGTERM}, 2, (Outcome.STOPPED, [], [], [[0], []])),
    ],
)
def test_the_loop_saves_and_leaves_as_wished(ranks2, tmp_path, in_steps, in_hook, interval, expected):
    assert ranks2.run(course_of, str(tmp_path), in_steps, in_hook, interval) == [expected, expected]


ALONE = """
import time
from megaresid.training.signals import Wishes
wishes = Wishes()
with wishes.listening():
    print("ready", flush=True)
    while True:
        if wishes._stop:
            print("stops", flush=True)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("supervised", [False, True])
def test_a_second_signal_ends_a_rank_that_nobody_supervises(tmp_path, number, supervised):
    environment = os.environ | ({"MEGARESID_SUPERVISOR": str(tmp_path)} if supervised else {})
    command = [sys.executable, "-c", ALONE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as rank:
        try:
            assert rank.stdout.readline() == "ready\n"
            rank.send_signal(number)
            assert rank.stdout.readline() == "stops\n"
            rank.send_signal(number)
            if supervised:  # a launcher sends it to the others when one has left
                assert rank.stdout.readline() == "stops\n" and rank.poll() is None
            else:
                assert rank.wait(30) == 128 + number
        finally:
            rank.kill()


def test_what_is_needed_before_the_first_import_of_torch_does_not_import_it():
    code = "import sys, megaresid.training.supervisor, megaresid.training.signals, megaresid.exit_codes; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
