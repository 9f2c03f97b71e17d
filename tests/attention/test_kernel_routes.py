"""Which form a recurrence takes on a GPU, from facts: no GPU and no fla is needed to ask."""

import pytest
import torch

from megaresid.attention.kernels import routes, self_check
from megaresid.attention.kernels.routes import DECAYS, Facts, facts_of, route
from megaresid.attention.kind import Kind
from megaresid.errors import UserError
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS

GOOD = Facts(hopper=False, triton="3.6.0", fla="0.6.0")
HOPPER = GOOD._replace(hopper=True)
BF16 = torch.bfloat16
GPU = torch.device("cuda")


def kernel(decay: str, delta: bool, facts: Facts, dtype: torch.dtype = BF16, keys: int = 64) -> str | None:
    taken = route(Kind(decay, delta, keys, 64), dtype, facts).kernel
    return None if taken is None else taken.name


FIRST = {
    ("none", False): "chunk_linear_attn",
    ("constant", False): "chunk_simple_gla",
    ("head", False): "chunk_simple_gla",
    ("channel", False): "chunk_gla",
    ("none", True): "chunk_delta_rule",
    ("constant", True): "chunk_gated_delta_rule",
    ("head", True): "chunk_gated_delta_rule",
    ("channel", True): "chunk_kda",
}


@pytest.mark.parametrize(("kind", "name"), FIRST.items(), ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_every_recurrence_has_its_kernel(kind, name, dtype):
    assert kernel(*kind, GOOD, dtype) == name
    assert route(Kind(*kind, 64, 64), dtype, GOOD).reason == ""


@pytest.mark.parametrize("triton", ["3.4.0", "3.6.0", "3.7.0"])
@pytest.mark.parametrize("decay", DECAYS)
def test_on_hopper_a_bad_triton_never_runs_a_scalar_gated_kernel(decay, triton):
    facts = HOPPER._replace(triton=triton)
    assert kernel(decay, False, facts) == (FIRST[decay, False] if decay in ("none", "constant") else "chunk_gla")
    assert kernel(decay, True, facts) == ("chunk_delta_rule" if decay == "none" else "chunk_kda")


def test_a_detour_says_why():
    taken = route(Kind("head", True, 64, 64), BF16, HOPPER)
    assert str(taken) == "chunk_kda (chunk_gated_delta_rule is wrong on Hopper with Triton 3.6.0, right from 3.7.1)"


@pytest.mark.parametrize("facts", [HOPPER._replace(triton=version) for version in ("3.3.1", "3.7.1", "3.9.0")] + [GOOD])
@pytest.mark.parametrize("kind", FIRST, ids=str)
def test_other_tritons_and_other_gpus_run_the_first_choice(kind, facts):
    assert kernel(*kind, facts) == FIRST[kind]


@pytest.mark.parametrize("kind", FIRST, ids=str)
def test_precision_is_never_lost_unasked(kind):
    """fp64 is not rounded; fp32 only where torch's own products may be; what takes no fp32 gets none."""
    assert kernel(*kind, GOOD._replace(tf32=True), torch.float64) is None
    assert kernel(*kind, GOOD, torch.float32) is None
    rounded = FIRST[kind] if kind != ("none", True) else None
    assert kernel(*kind, GOOD._replace(tf32=True), torch.float32) == rounded


def test_the_plain_form_needs_no_fla():
    assert kernel("channel", False, GOOD._replace(fla=None, triton=None), torch.float32) is None


@pytest.mark.parametrize(
    ("facts", "found"),
    [
        (GOOD._replace(fla=None), "there is no fla-core: pip install"),
        (GOOD._replace(triton=None), "there is no triton: pip install"),
        (GOOD._replace(fla=None, triton=None, missing=("einops",)), "no fla-core and no triton and no einops: pip"),
        (GOOD._replace(missing=("einops",)), '"triton>=3.3" einops'),
        (GOOD._replace(fla="0.5.2"), "fla-core 0.5.2 computes wrong gradients on some GPUs: pip install"),
        (GOOD._replace(triton="3.2.0"), "not Triton 3.2.0: pip install"),
        (HOPPER._replace(triton=None), "there is no triton: pip install"),
    ],
)
def test_what_is_missing_or_too_old_is_named_with_the_mend(facts, found):
    with pytest.raises(UserError) as error:
        route(Kind("head", True, 64, 64), BF16, facts)
    assert found in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("decay", DECAYS)
def test_heads_too_wide_for_the_delta_rules_kernels_are_refused(decay):
    assert kernel(decay, True, GOOD, keys=256) and kernel(decay, False, GOOD, keys=257)
    with pytest.raises(UserError, match="keys are 257 wide, and chunk_.*, takes at most 256: give"):
        kernel(decay, True, GOOD, keys=257)


@pytest.mark.parametrize(("capability", "hip", "hopper"), [((9, 0), None, True), ((8, 0), None, False),
                                                           ((10, 0), None, False), ((9, 4), "6.2", False)])
def test_facts_are_read_from_the_gpu_and_the_installation(monkeypatch, capability, hip, hopper):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(routes.metadata, "version", {"fla-core": "0.6.0", "pytorch-triton": "3.5.0"}.__getitem__)
    monkeypatch.setattr(routes.metadata, "PackageNotFoundError", KeyError)
    routes._lasting_facts.cache_clear()
    try:
        found = facts_of(GPU)
    finally:
        routes._lasting_facts.cache_clear()
    assert (found.hopper, found.triton, found.fla, found.tf32) == (hopper, "3.5.0", "0.6.0", False)


def test_tf32_is_as_torch_has_it(monkeypatch):
    monkeypatch.setattr(routes, "_lasting_facts", lambda device: GOOD)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert facts_of(GPU).tf32
    finally:
        torch.set_float32_matmul_precision(before)
    assert not facts_of(GPU).tf32


def test_a_plan_is_checked_before_anything_is_built(monkeypatch):
    """Its recurrences are asked for by their sizes; on a CPU nothing is."""
    monkeypatch.setattr(self_check, "facts_of", lambda device: GOOD._replace(fla=None))
    kinds = ModelPlan(PRESETS["tiny"], "gated_delta_net + softmax + gla").kinds()
    assert {(kind.decay, kind.delta) for kind in kinds} == {("head", True), ("channel", False)}
    with pytest.raises(UserError, match="there is no fla-core"):
        self_check.check_kernels(kinds, GPU, BF16)
    self_check.check_kernels(kinds, torch.device("cpu"), BF16)
    self_check.check_kernels(ModelPlan(PRESETS["tiny"]).kinds(), GPU, BF16)


@pytest.mark.parametrize(
    ("attention", "device", "dtype", "whole"),
    [
        ("gla", "cpu", BF16, True),
        ("gla", "cuda", BF16, False),
        ("softmax + gla", "cuda", BF16, False),
        ("gla", "cuda", torch.float32, True),
        ("softmax", "cuda", BF16, True),
    ],
)
def test_only_a_kernel_breaks_the_graph(monkeypatch, attention, device, dtype, whole):
    monkeypatch.setattr(self_check, "facts_of", lambda device: GOOD)
    assert ModelPlan(PRESETS["tiny"], attention).one_graph(torch.device(device), dtype) == whole
