"""A run that stops and resumes is the run that did not stop; any ZeRO stage and rank count loads any other's."""

import json

import pytest
import torch
from engines import ADAMW, SGD, adam_steps, equal, full_state, make_engine, train
from safetensors import safe_open

from megaresid.errors import UserError
from megaresid.training import checkpoint
from megaresid.training.checkpoint import copy_parameters, load_checkpoint, read_parameters, save_checkpoint

IDENTITY = {"data": "d0", "spec": "s0"}
CPU_OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
CPU_ADAM = {"type": "AdamW", "params": {"lr": 1e-2}}
FULL = pytest.mark.full
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


def saved(engine, parameters, folder, step, **options):
    return save_checkpoint(engine, parameters, folder, step=step, counters={"tokens": 7}, identity=IDENTITY, **options)


def stop_and_resume(folder, config):
    """(losses, parameters and optimizer state) after 3 + 2 steps: without a stop, and by a fresh engine from step 3."""
    engine, parameters = make_engine(**config)
    train(engine, range(3))
    path = saved(engine, parameters, folder, 3)
    straight = train(engine, range(3, 5)), full_state(engine, parameters)
    counted = engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps
    engine.destroy()

    engine, parameters = make_engine(**config, seed=1)
    assert load_checkpoint(engine, parameters, path).step == 3
    resumed = train(engine, range(3, 5)), full_state(engine, parameters)
    assert counted == (engine.global_steps, engine.global_samples, engine.micro_steps, engine.skipped_steps)
    engine.destroy()
    return straight, resumed


def quick_at(chosen: int, options: dict, name: str, stages) -> list:
    """The stages as a test's parameters, all but the chosen one in the full tier only."""
    marks = {stage: [] if stage == chosen else [FULL] for stage in stages}
    return [pytest.param({"stage": stage, **options}, id=f"zero{stage}-{name}", marks=marks[stage]) for stage in stages]


@pytest.mark.parametrize(
    "config",
    [
        *(pytest.param({"stage": stage}, id=f"zero{stage}") for stage in range(4)),
        *quick_at(2, {"accumulation": 2}, "accumulation", (0, 2)),
        *quick_at(3, {"optimizer": SGD}, "sgd", (0, 1, 3)),
        *quick_at(2, CPU_OFFLOAD, "offload", (1, 2, 3)),
        *(  # DeepSpeed's own AdamW for CPUs, whose compilation takes a minute
            pytest.param({"stage": stage, "optimizer": CPU_ADAM, **CPU_OFFLOAD}, id=f"zero{stage}-cpu-adam", marks=FULL)
            for stage in (1, 2, 3)
        ),
        *quick_at(1, BF16, "bf16", (1, 2, 3)),
        *quick_at(3, AUTOCAST, "autocast", range(4)),
    ],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(ranks2, tmp_path, config):
    for straight, resumed in ranks2.run(stop_and_resume, tmp_path, config, timeout=300):
        assert straight[0] == resumed[0]
        assert equal(straight[1], resumed[1])


def train_and_save(folder, stage, step=3):
    """The checkpoint's path, and the state it holds as DeepSpeed assembles it."""
    engine, parameters = make_engine(stage)
    train(engine, range(step))
    path, state = saved(engine, parameters, folder, step), full_state(engine, parameters)
    engine.destroy()
    return path, state


def load_into_every_stage(path):
    """By stage: what ``load_checkpoint`` says, the state, AdamW's counts and whether the generators stayed theirs."""
    seen = []
    for stage in range(4):
        engine, parameters = make_engine(stage, seed=1)
        before = torch.get_rng_state()
        loaded = load_checkpoint(engine, parameters, path)
        kept = torch.equal(before, torch.get_rng_state())
        seen.append((loaded, full_state(engine, parameters), adam_steps(engine), kept))
        engine.destroy()
    return seen


SAVED = [("ranks2", stage) for stage in range(4)] + [("ranks1", 1), ("ranks1", 3)]
QUICK_LOADS = {("ranks2", 1, "ranks1"), ("ranks2", 2, "ranks2"), ("ranks2", 3, "ranks1"), ("ranks1", 3, "ranks2")}
LOADS = [(*saved, loading) for saved in SAVED for loading in ("ranks1", "ranks2")]


@pytest.mark.parametrize(
    "saving, stage, loading",
    [pytest.param(*load, marks=[] if load in QUICK_LOADS else [FULL]) for load in LOADS],
)
def test_any_stage_and_rank_count_loads_from_any_other(request, tmp_path, saving, stage, loading):
    path, state = request.getfixturevalue(saving).run(train_and_save, tmp_path, stage)[0]
    for of_rank in request.getfixturevalue(loading).run(load_into_every_stage, path):
        for loaded, restored, counts, kept_generators in of_rank:
            assert (loaded.step, loaded.counters, loaded.identity) == (3, {"tokens": 7}, IDENTITY)
            assert loaded.world_size == int(saving[-1])
            assert equal(restored, state) and counts == {3.0}
            assert kept_generators == (saving != loading)


@pytest.mark.parametrize("stage", range(4))
def test_files_hold_every_element_once_and_are_what_the_format_says(ranks2, tmp_path, stage):
    (path, state), _ = ranks2.run(train_and_save, tmp_path, stage)
    header = json.loads((path / "checkpoint.json").read_text())
    assert (header["step"], header["world_size"], header["identity"]) == (3, 2, IDENTITY)
    assert header["parameters"] == {name: list(value.shape) for name, value in state["parameter"].items()}
    assert all(numbers == {"step": 3} for numbers in header["scalars"].values())
    assert set(header["scalars"]) == set(state["exp_avg"])
    assert header["generators"][0] != header["generators"][1]

    assembled = {kind: {name: torch.full((value.numel(),), torch.nan) for name, value in state[kind].items()}
                 for kind in ("parameter", "exp_avg", "exp_avg_sq")}  # fmt: skip
    written = 0
    for rank in range(2):
        with safe_open(path / f"rank_{rank:05d}.safetensors", "pt") as file:
            runs = json.loads(file.metadata()["runs"])
            for key in file.keys():
                kind, name = key.split(":")
                offset, length = runs[name]
                written += length
                assembled[kind][name][offset : offset + length] = file.get_tensor(key)
    assert written == sum(value.numel() for kind in assembled for value in state[kind].values())
    for kind, values in assembled.items():
        for name, value in values.items():
            assert torch.equal(value, state[kind][name].view(-1)), (kind, name)


@pytest.mark.parametrize("stage", range(4))
def test_read_parameters_assembles_what_deepspeed_assembles(ranks2, tmp_path, stage):
    (path, state), _ = ranks2.run(train_and_save, tmp_path, stage)
    assert equal(read_parameters(path), state["parameter"])
    some = read_parameters(path, ["gate", "embed.weight"])
    assert list(some) == ["gate", "embed.weight"] and torch.equal(some["gate"], state["parameter"]["gate"])
    with pytest.raises(UserError, match="no parameter 'gates'; did you mean 'gate'?"):
        read_parameters(path, ["gates"])


def save_untrained_and_load_into_trained(folder, config):
    engine, parameters = make_engine(**config)
    path = saved(engine, parameters, folder, 0)
    straight = train(engine, range(2)), full_state(engine, parameters)
    engine.destroy()
    engine, parameters = make_engine(**config, seed=1)
    train(engine, range(2))
    load_checkpoint(engine, parameters, path)
    resumed = train(engine, range(2)), full_state(engine, parameters)
    engine.destroy()
    return straight, resumed


@pytest.mark.parametrize(
    "optimizer", [pytest.param(ADAMW, id="adamw"), pytest.param(SGD, id="sgd", marks=FULL)]
)
@pytest.mark.parametrize("stage", range(4))
def test_a_checkpoint_from_before_the_first_step_undoes_all_steps(ranks2, tmp_path, stage, optimizer):
    config = {"stage": stage, "optimizer": optimizer}
    for straight, resumed in ranks2.run(save_untrained_and_load_into_trained, tmp_path, config):
        assert straight[0] == resumed[0] and equal(straight[1], resumed[1])


def accumulate_differently(folder):
    engine, parameters = make_engine(1)
    train(engine, range(3))
    path = saved(engine, parameters, folder, 3)
    engine.destroy()
    engine, parameters = make_engine(1, accumulation=2)
    load_checkpoint(engine, parameters, path)
    train(engine, range(3, 4))
    seen = engine.global_steps, engine.micro_steps, adam_steps(engine)
    engine.destroy()
    return seen


def test_another_accumulation_continues_at_a_boundary(ranks1, tmp_path):
    assert ranks1.run(accumulate_differently, tmp_path) == [(4, 8, {4.0})]


def copy_into(stage, path):
    """The state before and after copying, and how many elements of each parameter this rank read."""
    engine, parameters = make_engine(stage, seed=1)
    train(engine, range(1))
    before, counters = full_state(engine, parameters), (engine.global_steps, engine.micro_steps)
    read, elements = checkpoint.SavedState.read, {}

    def counting(self, kind, name, offset, out):
        assert kind == "parameter"
        elements[name] = elements.get(name, 0) + out.numel()
        read(self, kind, name, offset, out)

    checkpoint.SavedState.read = counting
    try:
        copy_parameters(engine, parameters, path)
    finally:
        checkpoint.SavedState.read = read
    assert counters == (engine.global_steps, engine.micro_steps)
    after = full_state(engine, parameters)
    engine.destroy()
    return before, after, elements


@pytest.mark.parametrize(
    "saving, stage, copying",
    [
        pytest.param(*saving, copying, marks=[] if copying == (saving[1] + 1) % 4 else [FULL])
        for saving in [("ranks1", 0), ("ranks1", 1), ("ranks2", 2), ("ranks2", 3)]
        for copying in range(4)
    ],
)
def test_copied_parameters_are_the_checkpoint_s_and_leave_the_optimizer(
    request, ranks2, tmp_path, saving, stage, copying
):
    path, state = request.getfixturevalue(saving).run(train_and_save, tmp_path, stage)[0]
    source = state["parameter"]
    seen = ranks2.run(copy_into, copying, path)
    for before, after, _ in seen:
        assert not equal(before["parameter"], source)
        assert equal(after["parameter"], source) and equal(after["weights"], source)
        assert equal(after["exp_avg"], before["exp_avg"]) and equal(after["exp_avg_sq"], before["exp_avg_sq"])
    for name, value in source.items():  # each rank reads what it holds: all of it only where that is replicated
        holders = 2 if copying == 0 or (name == "shift" and copying < 3) else 1
        assert sum(elements.get(name, 0) for _, _, elements in seen) == holders * value.numel()


def load_into_renamed(load, path, renaming, shape):
    """Load into a model with other names, or another shape of one parameter; nothing may change."""
    engine, parameters = make_engine(0)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    renamed = {renaming.get(name, name): parameter for name, parameter in parameters.items()}
    if shape is not None:
        renamed["gate"] = torch.nn.Parameter(torch.zeros(shape))
    try:
        load(engine, renamed, path)
    finally:
        assert equal({name: parameter.detach() for name, parameter in parameters.items()}, before)
        assert not engine.optimizer.state and engine.global_steps == 0
        engine.destroy()


@pytest.mark.parametrize("load", [load_checkpoint, copy_parameters])
def test_other_names_and_shapes_are_an_error_that_names_them(ranks2, tmp_path, load):
    (path, _), _ = ranks2.run(train_and_save, tmp_path, 1)
    with pytest.raises(UserError, match="lacks parameter inner.bas of this model; did you mean 'inner.bias'?"):
        ranks2.run(load_into_renamed, load, path, {"inner.bias": "inner.bas"}, None)
    with pytest.raises(UserError, match=r"gate has shape \[1\] there and \[2\] here"):
        ranks2.run(load_into_renamed, load, path, {}, (2,))


def load_what_was_stepped_unevenly(folder):
    engine, parameters = make_engine(0)
    train(engine, range(2))
    engine.optimizer.state[parameters["inner.bias"]]["step"] += 1
    path = saved(engine, parameters, folder, 2)
    engine.destroy()
    engine, parameters = make_engine(1)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        load_checkpoint(engine, parameters, path)
    finally:
        assert equal({name: parameter.detach() for name, parameter in parameters.items()}, before)
        engine.destroy()


def test_counts_that_a_stage_cannot_hold_apart_are_an_error(ranks2, tmp_path):
    with pytest.raises(UserError, match="'step' is .* resume with the stage of the checkpoint"):
        ranks2.run(load_what_was_stepped_unevenly, tmp_path)
