"""Every variant trains under ZeRO 1, 2 and 3 on two ranks, and in a pipeline of two stages cut at each boundary of its
layers, as the plain module does in a plain loop; and goes on from a checkpoint bitwise.
"""

import functools
from unittest import mock

import pytest
import torch
from courses import (
    ADAMW,
    SGD,
    assert_pipeline_trains,
    assert_resumes_bitwise,
    assert_same_course,
    mean_over_ranks,
    micro_batches,
    run_steps,
    shape_of,
    start_engine,
    train_and_resume,
    train_under_zero,
)
from small_models import SHAPE, Case
from variant_table import FAMILY_HEADS, ONE_OF_EACH, ROWS

from megaresid.errors import UserError
from megaresid.model.pipeline import pipeline_module
from megaresid.model.plan import ModelPlan

MIXERS = ("value_residual", "value_residual(learned=true)")  # that stand for a residual scheme
CASES = {str(row): row.case for row in ROWS} | {mixer: Case("vanilla", mixer, layers=3, step=0) for mixer in MIXERS}


def quick(chosen: set[str]) -> list:
    """All cases as a test's parameters: those not ``chosen`` run in the full tier only."""
    marks = {name: [] if name in chosen else [pytest.mark.full] for name in CASES}
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in CASES.items()]


HEADS = {str(row) for row in FAMILY_HEADS}
QUICK = {*map(str, ONE_OF_EACH), *MIXERS}
SHARED = {name for name in CASES if name.startswith("shared_token_gate")}


@pytest.mark.parametrize("case", quick(HEADS))
def test_zero_2_trains_as_a_plain_loop(case, ranks2, tmp_path):
    """It differs from ZeRO 1 in when gradients are reduced, which is no matter of the variant: few of them, quickly."""
    assert_same_course(mean_over_ranks(*ranks2.run(train_under_zero, case, 2, str(tmp_path))), case)


@pytest.mark.parametrize("case", quick(HEADS | {*MIXERS}))
def test_zero_3_trains_as_a_plain_loop(case, ranks2, tmp_path):
    assert_same_course(mean_over_ranks(*ranks2.run(train_under_zero, case, 3, str(tmp_path))), case)


@pytest.mark.parametrize("case", quick(HEADS))
def test_zero_1_trains_as_a_plain_loop_and_a_resumed_run_repeats_it_bitwise(case, ranks2, tmp_path):
    first, second = ranks2.run(train_and_resume, case, 1, SGD, str(tmp_path))
    assert_same_course(mean_over_ranks(first[0], second[0]), case)
    assert_resumes_bitwise((first, second))


@pytest.mark.parametrize("case", quick(HEADS))
def test_a_run_under_zero_3_with_adamw_resumes_bitwise(case, ranks2, tmp_path):
    assert_resumes_bitwise(ranks2.run(train_and_resume, case, 3, ADAMW, str(tmp_path)))


@pytest.mark.parametrize("case", quick(QUICK))
def test_two_pipeline_stages_train_as_the_plain_module(case, ranks2):
    """Cut in the middle of the layers; refused where the stages would share a module."""
    plan = ModelPlan(shape_of(case), case.attention, case.residual)
    if any(variant.shared() for variant in plan.variants()):
        with pytest.raises(UserError, match="stages of a pipeline share no module"):
            pipeline_module(plan, stages=2, seed=0)
        return
    assert_pipeline_trains(case, cut=2 + case.layers // 2, ranks=ranks2)


@pytest.mark.parametrize("case", [param for param in quick(HEADS) if param.id not in SHARED])
def test_two_pipeline_stages_may_be_cut_anywhere(case, ranks2):
    """Before every other layer, and before the close."""
    for cut in range(2, case.layers + 3):
        if cut != 2 + case.layers // 2:
            assert_pipeline_trains(case, cut, ranks2)


def site_classes(case: Case, layers: int) -> set[type]:
    plan = ModelPlan(SHAPE.model_copy(update={"layers": layers}), residual=case.residual)
    variants = enumerate(map(plan.residual_of, range(layers)))
    with torch.device("meta"):
        return {type(variant.site(place)) for layer, variant in variants for place in variant.places(layer)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nothing_of_a_variant_is_left_out_at_this_depth(case):
    assert site_classes(case, case.layers) == site_classes(case, 24)


@pytest.mark.full
@pytest.mark.parametrize("spec", ["attention_residuals", "block_attention_residuals", "pro_res(warmup=2)"])
def test_the_compiled_engine_keeps_to_one_graph_for_training_and_one_for_evaluation(spec, ranks1, tmp_path):
    """Whatever the layers' states and the step: no part runs uncompiled, and no step compiles anew."""
    (graphs,) = ranks1.run(compiled_graphs, spec, str(tmp_path))
    assert graphs == [1, 2, 2, 2, 2, 2]


def compiled_graphs(spec: str, folder: str) -> list[int]:
    """Runs on the one rank: how many graphs there are after each of three training steps and evaluations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = Case(spec, "softmax", layers=3, step=0)
    # The graphs are dynamo's; what runs them is no matter here, and inductor takes a minute.
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    with mock.patch("megaresid.training.engine.torch.compile", compile_eagerly):
        engine = start_engine(case, 1, folder, compile=True)
    counters, graphs = torch._dynamo.utils.counters, []
    for step in range(3):
        run_steps(engine, case, step, step + 1)
        graphs.append(counters["stats"]["unique_graphs"])
        engine.loss(*next(micro_batches(slice(0, 2), step)))
        graphs.append(counters["stats"]["unique_graphs"])
    engine.deepspeed.destroy()
    assert not counters["graph_break"]
    return graphs
