"""What a bad step is, and that it changes nothing under any ZeRO stage: as in a plain loop that leaves it out."""

import json
import math
import random
from functools import cache

import pytest
import torch
import torch.distributed as dist
from gpt_runs import ADAMW, GLOBAL_BATCH, configuration, micro_batches, plan_of, sample, start_engine

from megaresid.config import HealthOptions
from megaresid.model.gpt import build
from megaresid.training.health import Health, Next, finite
from megaresid.training.schedule import learning_rate
from megaresid.training.update_gate import UpdateGate
from megaresid.training.zero_state import live_state

END, RATE_STEPS = 9, 20
FAULTS = {4: "nan gradient", 5: "inf loss", 7: "gradient x 100"}
"""Of steps numbered from 1, each on rank 1 alone."""
WINDOW = 3


def steady(health: Health, steps: int, seed: int = 0) -> None:
    noise = random.Random(seed)
    for step in range(steps):
        assert health.accepts(step + 1, 3.0 + noise.gauss(0, 0.1), math.exp(noise.gauss(0, 0.4)))


@pytest.mark.parametrize("seed", range(5))
def test_the_defaults_leave_noisy_runs_alone(seed):
    """10,000 steps: a loss that falls from 11 to 3 under noise from 1/10 to 1/100, norms that fall from 20 to 0.3 and
    spread over factors, with a batch of another difficulty now and then."""
    noise, health = random.Random(seed), Health(HealthOptions())
    for step in range(10_000):
        fallen = math.exp(-step / 500)
        hard = 0.25 if noise.random() < 0.01 else 0.0
        loss = 3 + 8 * fallen + noise.gauss(0, 0.01 + 0.09 * fallen) + hard
        norm = (0.3 + 20 * fallen) * math.exp(noise.gauss(0, 0.35)) * (3.0 if hard else 1.0)
        assert health.accepts(step + 1, loss, norm), health.verdict
    assert health.bad_steps == 0


def test_a_spike_is_judged_by_the_deviation_of_the_last_good_steps():
    """Against the definition, with the floors out of reach: mean and population deviation over the window."""
    health = Health(HealthOptions(spike_window=10, spike_threshold=4))
    losses, norms = [3.0 + (i * 7 % 10) for i in range(12)], [math.exp(i * 3 % 10) for i in range(12)]
    for step, (loss, norm) in enumerate(zip(losses, norms)):
        assert health.accepts(step + 1, loss, norm)
    last = torch.tensor(losses[-10:], dtype=torch.float64)
    logs = torch.tensor(norms[-10:], dtype=torch.float64).log()
    loss, norm = 20.0, math.exp(15.0)
    assert not health.accepts(13, loss, norm)
    assert health.verdict.loss_z == pytest.approx(float((loss - last.mean()) / last.std(correction=0)))
    assert health.verdict.norm_z == pytest.approx(float((15.0 - logs.mean()) / logs.std(correction=0)))


def test_spikes_are_upward_only_and_wait_for_a_full_window():
    early = Health(HealthOptions(spike_window=50))
    steady(early, 49)
    assert early.accepts(50, 1000.0, 1.0)
    health = Health(HealthOptions(spike_window=50))
    steady(health, 50)
    assert health.accepts(51, -1000.0, 1e-20)
    assert not health.accepts(52, 1e6, 1.0) and "loss" in health.verdict.reason
    assert not health.accepts(53, 3.0, 1e25) and "gradient norm" in health.verdict.reason


def test_the_steadiest_run_may_rise_by_the_floors():
    for loss, norm, accepted in [(3.39, 1.0, True), (3.41, 1.0, False), (3.0, 7.3, True), (3.0, 7.5, False)]:
        health = Health(HealthOptions(spike_window=20))
        for step in range(20):
            health.accepts(step + 1, 3.0, 1.0)
        assert health.accepts(21, loss, norm) is accepted


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_spike", ["none", "skip", "rollback", "stop"])
def test_what_is_not_finite_is_never_applied(value, on_spike):
    for loss, norm in [(value, 1.0), (3.0, value)]:
        assert not Health(HealthOptions(on_spike=on_spike)).accepts(1, loss, norm)


def test_bad_steps_do_not_make_each_other_normal():
    health = Health(HealthOptions(spike_window=20, max_bad_steps=100))
    steady(health, 30)
    assert not any(health.accepts(31 + n, 9.0, 1.0) for n in range(99))
    assert health.bad_in_a_row == 99 and health.next() is Next.GO_ON
    assert health.accepts(130, 3.0, 1.0) and health.bad_in_a_row == 0


@pytest.mark.parametrize(
    "on_spike, after",
    [
        ("none", [Next.GO_ON] * 4),
        ("skip", [Next.GO_ON, Next.GO_ON, Next.STOP, Next.STOP]),
        ("rollback", [Next.GO_ON, Next.GO_ON, Next.ROLL_BACK, Next.ROLL_BACK]),
        ("stop", [Next.STOP] * 4),
    ],
)
def test_what_follows_from_spikes_in_a_row(on_spike, after):
    health = Health(HealthOptions(on_spike=on_spike, spike_window=20, max_bad_steps=3))
    steady(health, 20)
    for step, expected in enumerate(after):
        assert health.accepts(21 + step, 1e9 * 1000**step, 1.0) is (on_spike == "none")
        assert health.next() is expected


@pytest.mark.parametrize("on_spike", ["none", "skip", "rollback", "stop"])
def test_a_good_step_lets_the_run_go_on_and_ends_the_row(on_spike):
    health = Health(HealthOptions(on_spike=on_spike, spike_window=20, max_bad_steps=1))
    assert health.next() is Next.GO_ON
    steady(health, 20)
    health.accepts(21, math.nan, 1.0)
    assert health.bad_in_a_row == 1 and health.next() is not Next.GO_ON
    assert health.accepts(22, 3.0, 1.0) and health.next() is Next.GO_ON and health.bad_in_a_row == 0


def test_a_spike_that_is_applied_is_counted_and_belongs_to_what_the_next_is_judged_by():
    """--on-spike none: a new level is told once, a window long at most, and saving goes on meanwhile."""
    health = Health(HealthOptions(on_spike="none", spike_window=20, max_bad_steps=3))
    steady(health, 20)
    assert health.accepts(21, 9.0, 1.0) and health.verdict.reason
    assert (health.bad_steps, health.bad_in_a_row) == (1, 0)
    assert health.window()["loss_mean"] > 3.2
    for step in range(22, 42):
        assert health.accepts(step, 9.0, 1.0)
    assert not health.verdict.reason and health.window()["loss_mean"] == pytest.approx(9.0)


def test_the_window_is_told_as_it_is():
    """Against the definition; before the first step there is nothing to tell."""
    health = Health(HealthOptions(spike_window=4))
    assert health.window() == {"steps": 0} | dict.fromkeys(list(health.window())[1:])
    for step, (loss, norm) in enumerate([(9.0, 9.0), (1.0, 1.0), (2.0, math.e), (3.0, math.e**2), (6.0, math.e**5)]):
        assert health.accepts(step + 1, loss, norm)
    expected = {"steps": 4, "loss_mean": 3.0, "loss_deviation": 3.5**0.5}
    expected |= {"log_norm_mean": 2.0, "log_norm_deviation": 3.5**0.5}
    assert health.window() == pytest.approx(expected)


def test_a_gradient_of_nothing_is_no_fault():
    health = Health(HealthOptions(spike_window=3))
    assert all(health.accepts(step + 1, 3.0, 0.0) for step in range(5))


@pytest.mark.parametrize("loss, norm, expected", [(1, 1, True), (math.nan, 1, False), (1, math.inf, False)])
def test_the_least_that_is_asked(loss, norm, expected):
    assert finite(loss, norm) is expected


def test_a_resumed_run_judges_as_the_uninterrupted_one():
    """Through JSON, as a checkpoint keeps it: every later score is the same, bit for bit."""
    one = Health(HealthOptions(spike_window=20))
    steady(one, 33)
    one.accepts(34, math.nan, 1.0)
    other = Health(HealthOptions(spike_window=20), json.loads(json.dumps(one.state())))
    for step, loss in enumerate([98.0, 3.1, 99.0, 2.9, math.inf, 3.0]):
        assert one.accepts(35 + step, loss, 1.1) == other.accepts(35 + step, loss, 1.1)
        assert one.verdict == other.verdict and one.bad_in_a_row == other.bad_in_a_row
        assert one.bad_steps == other.bad_steps


def state_of(engine) -> dict:
    """This rank's parameters, optimizer state and step counts, and the weights that its module computes with (those of
    ZeRO-3 are the parameters; it holds them whole or not as it likes)."""
    live = live_state(engine.deepspeed, engine.parameters)
    found = {(kind, run.name): elements.clone() for kind, run, elements in live.tensors(dist.get_rank(), 2)}
    if engine.stage < 3:
        found |= {("weights", name): parameter.detach().clone() for name, parameter in engine.parameters.items()}
    counts = {(key, name): torch.tensor(n) for name, of in live.scalars().items() for key, n in of.items()}
    return found | counts


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def faulty_course(sections: dict, folder: str, clip: float = 0.0):
    """Runs on every rank: of each step (mean loss, gradient norm, skipped, whether any state changed)."""
    config = configuration(micro_batch_size=2, steps=RATE_STEPS, clip=clip)
    engine = start_engine(config, {"optimizer": ADAMW} | sections, folder)
    source = micro_batches(config, engine.batch, dist.get_rank())
    health = Health(HealthOptions(spike_window=WINDOW))
    backward, course = engine.deepspeed.backward, []
    for step in range(END):
        fault = FAULTS.get(step + 1) if dist.get_rank() == 1 else None
        factor = {"nan gradient": math.nan, "gradient x 100": 100.0}.get(fault, 1.0)
        engine.deepspeed.backward = lambda loss, factor=factor: backward(loss * factor)
        hook = None
        if fault == "inf loss":  # finite gradients: only the loss can tell
            module = engine.deepspeed.module
            hook = module.register_forward_hook(lambda _, __, output: (None, output[1] + math.inf))
        before = state_of(engine)
        rate = learning_rate(step, RATE_STEPS, config.optimizer)
        result = engine.train_step(source, rate, lambda *numbers: health.accepts(step + 1, *numbers))
        if hook:
            hook.remove()
        course.append((result.mean_loss, result.gradient_norm, result.skipped, not same(before, state_of(engine))))
    skipped = engine.deepspeed.skipped_steps
    engine.deepspeed.destroy()
    return course, skipped


@cache
def plain_course(clip: float) -> list[tuple[float, float]]:
    """The definition: (loss, norm) of each step of a plain loop that makes no update in the faulty ones."""
    config = configuration(steps=RATE_STEPS, clip=clip)
    model = build(plan_of(config), config.run.seed)
    decayed, decay = [p for p in model.parameters() if p.ndim >= 2], config.optimizer.weight_decay
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    stepper, course = torch.optim.AdamW(groups, betas=config.optimizer.betas), []
    for step in range(END):
        tokens = torch.stack([sample(step * GLOBAL_BATCH + j, config.shape.context) for j in range(GLOBAL_BATCH)])
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        for group in stepper.param_groups:
            group["lr"] = learning_rate(step, RATE_STEPS, config.optimizer)
        if step + 1 not in FAULTS:
            stepper.step()
        stepper.zero_grad()
        course.append((loss.item(), norm.item()))
    return course


ENGINES = {
    "zero 0": {"zero_optimization": {"stage": 0}},
    "zero 1": {"zero_optimization": {"stage": 1}},
    "zero 2": {"zero_optimization": {"stage": 2}},
    "zero 3": {"zero_optimization": {"stage": 3}},
    "zero 3 cut small": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "zero 2 offloaded": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "zero 3 offloaded": {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "zero_force_ds_cpu_optimizer": False,
    },
}


@pytest.mark.parametrize("clip", [pytest.param(0.0, marks=pytest.mark.full), 0.3])
@pytest.mark.parametrize("name", ENGINES)
def test_a_bad_step_on_one_rank_changes_nothing_on_any(name, clip, ranks2, tmp_path):
    courses = ranks2.run(faulty_course, ENGINES[name], str(tmp_path), clip)
    assert courses[0] == courses[1], "the ranks were not told the same"
    course, skipped = courses[0]
    assert skipped == len(FAULTS)
    for step, ((loss, norm, refused, changed), (true_loss, true_norm)) in enumerate(zip(course, plain_course(clip)), 1):
        assert refused is (step in FAULTS) and changed is (step not in FAULTS), f"step {step}"
        fault = FAULTS.get(step)
        assert math.isinf(norm) if fault == "nan gradient" else math.isfinite(norm)
        assert math.isinf(loss) if fault == "inf loss" else loss == pytest.approx(true_loss, rel=1e-5), f"step {step}"
        if fault in (None, "inf loss"):
            assert norm == pytest.approx(true_norm, rel=1e-4)
        if fault == "gradient x 100":
            assert norm > 30 * true_norm


BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.full) for stage in (2, 3))])
def test_a_bad_step_changes_nothing_where_weights_are_bf16(stage, ranks2, tmp_path):
    """ZeRO 1 has an optimizer of its own there, which sees what is not finite before it takes a norm."""
    courses = ranks2.run(faulty_course, BF16 | {"zero_optimization": {"stage": stage}}, str(tmp_path), 0.3)
    assert str(courses[0]) == str(courses[1]), "the ranks were not told the same"
    course, skipped = courses[0]
    assert skipped == len(FAULTS)
    for step, (loss, norm, refused, changed) in enumerate(course, 1):
        assert refused is (step in FAULTS) and changed is (step not in FAULTS), f"step {step}"
        assert math.isinf(norm) is (FAULTS.get(step) == "nan gradient")
        assert math.isinf(loss) is (FAULTS.get(step) == "inf loss")


@pytest.mark.parametrize("norm, told", [(2.0, 2.0), (0.0, 0.0), (-1.0, math.inf), (math.nan, math.inf)])
def test_a_norm_that_is_not_finite_is_asked_about_as_infinity(norm, told):
    """Some of DeepSpeed's optimizers give -1 for it."""
    gate, asked = object.__new__(UpdateGate), []
    gate._ask = lambda value: asked.append(value.item())
    gate._accepts(torch.tensor(norm))
    assert asked == [told]
