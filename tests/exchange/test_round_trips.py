"""From a run to each form and back, bit for bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from made_runs import configuration, made_run, same_parameters

import megaresid
from megaresid.attention.mixer import MIXERS
from megaresid.export import export
from megaresid.import_gpt2 import import_gpt2
from megaresid.residual.stream import RESIDUALS
from megaresid.training.checkpoint import load_checkpoint, save_checkpoint
from megaresid.training.ds_config import plan_batch, resolve
from megaresid.training.engine import Engine
from megaresid.training.run_dir import write_json

QUICK = ("hyper_connections", "pro_res", "mudd_former")
QUICK_MIXERS = ("gated_delta_net", "3*gla + softmax(window=4)")
OPTIONS = {"learning_rate": 0.01, "min_learning_rate": 0.0, "global_batch_size": 4, "steps": 5, "context": 12}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def assert_restored(tmp_path: Path, **options) -> None:
    model = made_run(tmp_path / "run", configuration(layers=4, **options), step=7)
    export(tmp_path / "run", "safetensors", tmp_path / "out")
    loaded = megaresid.load(tmp_path / "out")
    assert same_parameters(loaded, model)
    idx = torch.randint(50257, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert torch.equal(loaded(idx)[0], model(idx)[0])
    assert loaded.plan.hash == model.plan.hash


@pytest.mark.parametrize("residual", QUICK)
def test_variants_come_back_as_they_were(tmp_path, residual):
    assert_restored(tmp_path, residual=residual)


@pytest.mark.parametrize("attention", QUICK_MIXERS)
def test_mixers_come_back_as_they_were(tmp_path, attention):
    assert_restored(tmp_path, attention=attention, residual="hyper_connections(streams=2)")


@pytest.mark.full
@pytest.mark.parametrize("residual", sorted({*RESIDUALS.classes(), *RESIDUALS.presets()} - {*QUICK}))
def test_every_variant_comes_back_as_it_was(tmp_path, residual):
    assert_restored(tmp_path, residual=residual)


def without_a_gpu() -> list[str]:
    from megaresid.spec import Component

    found = []
    for name in sorted({*MIXERS.classes(), *MIXERS.presets()}):
        try:
            cls, options = MIXERS.resolve(Component(name))
        except Exception:  # options that have no default
            continue
        if not cls.needs_of(options):
            found.append(name)
    return found


@pytest.mark.full
@pytest.mark.parametrize("attention", without_a_gpu())
def test_every_mixer_comes_back_as_it_was(tmp_path, attention):
    assert_restored(tmp_path, attention=f"{attention} + softmax")


@pytest.mark.full
def test_documents_kept_apart_and_positions_left_out_come_back(tmp_path):
    assert_restored(tmp_path, separate_documents=True, positions="none", activation="gelu", dropout=0.2)


def test_through_hugging_face_and_back_is_bitwise(tmp_path):
    model = made_run(tmp_path / "run", configuration(activation="gelu", dropout=0.1))
    assert not model.head.weight[50257:].any()
    export(tmp_path / "run", "hf", tmp_path / "hf")
    import_gpt2(str(tmp_path / "hf"), tmp_path / "imported")
    back = megaresid.load(tmp_path / "imported")
    assert same_parameters(back, model) and back.plan.hash == model.plan.hash
    assert back.head.weight is back.parts[0].weight
    export(tmp_path / "imported", "hf", tmp_path / "again")
    for path in (tmp_path / "hf").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def save_at_stages(folder: str, stages: tuple[int, ...]) -> None:
    """Runs on every rank: two steps under the first stage, and its checkpoint saved again by the others."""
    config = configuration(**OPTIONS)
    plan, ranks = config.plan(), dist.get_world_size()
    batch = plan_batch(config, ranks)
    generator = torch.Generator().manual_seed(dist.get_rank())
    first = None
    for stage in stages:
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        path = Path(folder) / f"ds{dist.get_rank()}.json"
        write_json(path, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": zero})
        engine = Engine(plan, config, resolve(path, config, batch), batch)
        if first:
            load_checkpoint(engine.deepspeed, engine.parameters, first)
        else:
            for _ in range(2):
                idx = torch.randint(50257, (batch.accumulation, batch.micro, 13), generator=generator)
                engine.train_step([(each[:, :-1], each[:, 1:]) for each in idx], 0.01)
        run = Path(folder) / f"zero{stage}"
        identity = {"data": "abc", "spec": plan.hash}
        saved = save_checkpoint(
            engine.deepspeed, engine.parameters, run / "checkpoints", step=2, counters={}, identity=identity
        )
        first = first or saved
        if dist.get_rank() == 0:
            write_json(run / "config.json", {"schema": 1, **config.flat()})
        engine.deepspeed.destroy()


def assert_same_bytes(ranks, tmp_path, *stages: int) -> None:
    ranks.run(save_at_stages, str(tmp_path), stages)
    for stage in stages:
        assert len(list((tmp_path / f"zero{stage}" / "checkpoints").glob("step_00000002/rank_*"))) == ranks.ranks
        for format in ("safetensors", "hf"):
            export(tmp_path / f"zero{stage}", format, tmp_path / f"{format}{stage}")
            assert weights(tmp_path / f"{format}{stage}") == weights(tmp_path / f"{format}{stages[0]}")


def test_zero_1_and_3_give_the_same_bytes(ranks2, tmp_path):
    assert_same_bytes(ranks2, tmp_path, 1, 3)


@pytest.mark.full
def test_zero_0_and_2_give_the_same_bytes(ranks2, tmp_path):
    assert_same_bytes(ranks2, tmp_path, 2, 0)
