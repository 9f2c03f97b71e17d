"""The comparison that stands before every export."""

import math

import pytest
import torch

from megaresid.errors import UserError
from megaresid.exchange.check import largest_difference, probes, require_close, require_equal
from megaresid.model.presets import ModelShape

A = [torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 4.0]])]
NAN, INF = float("nan"), float("inf")


def changed(value: float) -> list[torch.Tensor]:
    return [A[0], torch.tensor([[3.0, value]])]


@pytest.mark.parametrize(
    "before, after, difference",
    [
        (A, A, 0),
        (A, changed(4.5), 0.5),
        (changed(4.5), A, 0.5),
        (A, changed(NAN), INF),
        (changed(NAN), A, INF),
        (changed(NAN), changed(NAN), 0),
        (changed(INF), changed(INF), 0),
        (changed(INF), changed(-INF), INF),
        (A, [A[0], torch.tensor([[3.0, 4.0, 5.0]])], INF),
    ],
)
def test_the_largest_difference(before, after, difference):
    assert largest_difference(before, after) == difference


def test_equal_is_equal_bit_for_bit():
    assert require_equal(A, A, "x") == "logits equal bit for bit"
    with pytest.raises(UserError, match="x failed the check: .* by up to 4.77e-07 .* none is allowed"):
        require_equal(A, changed(math.nextafter(4.0, 5) + 4.77e-7), "x")


def unasked():
    raise AssertionError("in fp64, though fp32 was enough")


def test_close_is_within_1e_4_or_equal_in_fp64():
    assert require_close(A, changed(4.00009), unasked, "x") == "logits equal to 9e-05, 0.0001 allowed"
    exact = [tensor.double() for tensor in A]
    assert "which is rounding: to 5e-09 in fp64" in require_close(
        A, changed(4.5), lambda: (exact, [exact[0], exact[1] + 5e-9]), "x"
    )
    with pytest.raises(UserError, match="by up to 2e-08 .* 1e-08 in fp64 is allowed"):
        require_close(A, changed(4.5), lambda: (exact, [exact[0], exact[1] + 2e-8]), "x")
    with pytest.raises(UserError, match="by up to inf"):
        require_close(A, changed(NAN), unasked, "x")


@pytest.mark.parametrize("context, lengths", [(1, [1]), (2, [1, 2]), (20, [1, 2, 20]), (1024, [1, 2, 33, 1024])])
def test_the_ids_are_the_same_each_time_and_of_several_lengths(context, lengths):
    shape = ModelShape(layers=1, heads=1, width=4, context=context)
    ids = probes(shape)
    assert [list(each.shape) for each in ids] == [[1, length] for length in lengths]
    assert all(torch.equal(one, other) for one, other in zip(ids, probes(shape)))
    assert all(0 <= each.min() and each.max() < shape.vocab_size for each in ids)
    assert (50256 in ids[-1]) == (context > 2)
