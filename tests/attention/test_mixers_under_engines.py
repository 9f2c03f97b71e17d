"""Every mixer trains under ZeRO 1, 2 and 3 on two ranks, and in a pipeline of two stages, as the plain module does in a
plain loop; and goes on from a checkpoint bitwise. Away from initialisation, with SGD."""

import pytest
from courses import (
    SGD,
    assert_pipeline_trains,
    assert_resumes_bitwise,
    assert_same_course,
    mean_over_ranks,
    train_and_resume,
    train_under_zero,
)
from mixer_table import FAMILY_HEADS, ONE_OF_EACH, quick
from small_models import Case

LAYERS = 2


def case_of(row) -> Case:
    """Further away than residual variants are: the norm of an output that is nearly zero would magnify rounding."""
    return Case("vanilla", row.spec, layers=LAYERS, step=0, away=0.3, rate=1e-3)


@pytest.mark.parametrize("row", quick(FAMILY_HEADS), ids=str)
def test_zero_3_trains_as_a_plain_loop(row, ranks2, tmp_path):
    case = case_of(row)
    assert_same_course(mean_over_ranks(*ranks2.run(train_under_zero, case, 3, str(tmp_path))), case)


@pytest.mark.parametrize("row", quick(FAMILY_HEADS), ids=str)
def test_zero_2_trains_as_a_plain_loop(row, ranks2, tmp_path):
    case = case_of(row)
    assert_same_course(mean_over_ranks(*ranks2.run(train_under_zero, case, 2, str(tmp_path))), case)


@pytest.mark.parametrize("row", quick(FAMILY_HEADS), ids=str)
def test_zero_1_trains_as_a_plain_loop_and_a_resumed_run_repeats_it_bitwise(row, ranks2, tmp_path):
    case = case_of(row)
    first, second = ranks2.run(train_and_resume, case, 1, SGD, str(tmp_path))
    assert_same_course(mean_over_ranks(first[0], second[0]), case)
    assert_resumes_bitwise((first, second))


@pytest.mark.parametrize("row", quick(ONE_OF_EACH), ids=str)
def test_two_pipeline_stages_train_as_the_plain_module(row, ranks2):
    assert_pipeline_trains(case_of(row), cut=2 + LAYERS // 2, ranks=ranks2)
