"""What gates are known to break: one set of parameters for all layers, exact ones, and what is kept of a wide gate."""

import copy

import pytest
import torch
from small_models import IDX, SHAPE, gradients_of, loss_of, model_of

from megaresid.errors import UserError
from megaresid.model.gpt import canonical_parameters, canonical_rules
from megaresid.model.init import Constant
from megaresid.model.pipeline import pipeline_module
from megaresid.model.plan import ModelPlan
from megaresid.residual.stream import ResidualVariant

SHARED = {f"shared.token_gate.{name}" for name in ("fc.weight", "fc.bias", "proj.weight", "proj.bias")}


def gates_of(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in canonical_parameters(model, model.prefixes).items() if "gate" in name}


def test_the_shared_gate_is_one_set_of_parameters():
    assert gates_of(model_of("shared_token_gate")).keys() == SHARED
    assert "gate" not in str([name for name, _ in model_of("shared_token_gate").parts.named_modules()])


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_of_the_shared_gate_is_the_sum_over_the_gates_of_the_sites(recompute):
    """Against a model with a gate a site, all of them set to the shared one."""
    shared, own = model_of("shared_token_gate", recompute=recompute), model_of("token_gate")
    values = gates_of(shared)
    with torch.no_grad():
        for name, parameter in gates_of(own).items():
            parameter.copy_(values["shared.token_gate." + name.split(".gate.")[1]])
    found, single = gradients_of(shared, loss_of(shared)), gradients_of(own, loss_of(own))
    for name in SHARED:
        local = name.removeprefix("shared.token_gate.")
        terms = [gradient for path, gradient in single.items() if path.endswith(f".gate.{local}")]
        assert len(terms) == 2 * SHAPE.layers
        torch.testing.assert_close(found[name], sum(terms), rtol=1e-10, atol=1e-14)


def test_a_deep_copy_has_one_shared_gate_of_its_own():
    model = model_of("shared_token_gate")
    twin = copy.deepcopy(model)
    before = loss_of(model)
    assert torch.equal(loss_of(twin), before)
    sites = [site for part in twin.parts[2:-1] for site in part.sites.values()]
    assert {id(site.gate[0]) for site in sites} == {id(twin.shared["token_gate"])}
    with torch.no_grad():
        twin.shared["token_gate"].proj.bias += 1
    assert torch.equal(loss_of(model), before) and not torch.equal(loss_of(twin), before)


class UsersSharedGate(ResidualVariant):
    """Not registered, so without a name; its gate has the name of the registered one's."""

    citation = "here"

    def shared(self):
        return {"token_gate": torch.nn.Identity()}


@pytest.mark.parametrize(
    "spec, refused",
    [
        ("shared_token_gate + shared_token_gate(form=sigmoid)", "shared_token_gate"),
        (f"shared_token_gate + {__name__}:UsersSharedGate", f"{__name__}:UsersSharedGate"),
    ],
)
def test_one_name_for_two_shared_modules_is_refused_before_anything_is_built(spec, refused):
    with pytest.raises(UserError, match=f"'{refused}' shares a module 'token_gate' .* one set of options"):
        ModelPlan(SHAPE, residual=spec)


def test_a_shared_gate_on_some_layers_is_used_by_those_alone():
    model = model_of("shared_token_gate + vanilla")
    assert gates_of(model).keys() == SHARED
    assert [hasattr(part.sites["mlp"], "gate") for part in model.parts[2:-1]] == [True, False, True, False]


def test_a_pipeline_refuses_a_shared_gate():
    """Before it builds anything: no process group is there."""
    with pytest.raises(UserError, match="'shared_token_gate' shares 'token_gate' over all layers"):
        pipeline_module(ModelPlan(SHAPE, residual="vanilla + shared_token_gate"), stages=2, seed=0)


@pytest.mark.parametrize("spec", ["token_gate", "shared_token_gate", "channel_gate"])
def test_gates_start_at_exactly_one_or_at_the_proposed_sigmoid(spec):
    xn = torch.randn(2, 3, SHAPE.width)
    for form, start in (("two_sigmoid", 1.0), ("sigmoid", 1 / (1 + torch.exp(torch.tensor(-3.0)).item()))):
        model = model_of(f"{spec}(form={form})", away=0, dtype=torch.float32)
        (gate, *_) = (module for module in model.modules() if type(module).__name__ == "Gate")
        assert gate(xn).unique().tolist() == pytest.approx([start], abs=0 if form == "two_sigmoid" else 1e-6)


def test_a_gate_starts_with_the_stream_bit_for_bit():
    for spec in ("token_gate", "shared_token_gate", "channel_gate"):
        found, expected = (model_of(name, away=0, dtype=torch.float32)(IDX[:, :-1])[0] for name in (spec, "vanilla"))
        assert torch.equal(found, expected), spec


def test_matrices_of_a_gate_decay_and_biases_do_not():
    model = model_of("token_gate")
    rules = canonical_rules(model, model.prefixes, model.plan)
    for site in ("layers.00.attention.site", "layers.03.mlp.site"):
        found = {name: rules[f"{site}.gate.{name}"] for name in ("fc.weight", "fc.bias", "proj.weight", "proj.bias")}
        assert [rule.decay for rule in found.values()] == [True, False, True, False]
        assert [rule.fp32 for rule in found.values()] == [False, False, True, True]
        assert found["proj.weight"].start == found["proj.bias"].start == Constant(0.0)


def kept_by_layers(model) -> dict[int, int]:
    """How many storages of each size (in numbers) a forward pass keeps, parameters apart."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and tensor.is_floating_point():
            kept[storage._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model)
    sizes = [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values()]
    del loss
    return {size: sizes.count(size) for size in sizes}


def test_a_channel_gate_keeps_the_sublayers_output_and_no_gate():
    stream = 2 * SHAPE.context * SHAPE.width
    found, vanilla = (kept_by_layers(model_of(spec))[stream] for spec in ("channel_gate", "vanilla"))
    assert found - vanilla == 2 * SHAPE.layers
