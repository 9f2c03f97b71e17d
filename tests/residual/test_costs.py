"""What every variant says that it costs and carries, against what is counted: parameters, FLOPs, kept bytes, state."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from small_models import loss_of, model_of
from torch import Tensor, nn
from variant_table import ROWS

from megaresid.model.count import parameters_by_component
from megaresid.model.flops import residual_cost
from megaresid.model.gpt import GPT
from megaresid.model.measure import count_flops, saved_bytes
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS, ModelShape
from megaresid.residual.cost import BYTES, Cost
from megaresid.residual.stream import SUBLAYERS, State

SHAPE = ModelShape(layers=6, heads=2, width=128, context=128, vocab_size=256)
IDX = torch.randint(SHAPE.vocab_size, (2, SHAPE.context + 1), generator=torch.Generator().manual_seed(0))
TOKENS = 2 * SHAPE.context
SLACK = 6  # FLOPs or numbers per token that a closed form may leave out


class Reader(nn.Module):
    """Stands for a sublayer: linear maps that keep their inputs, for q, k and v each. Nothing keeps its output."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(SHAPE.width, SHAPE.width) for _ in "qkv")

    def forward(self, x: Tensor | tuple[Tensor, ...], side: State) -> tuple[Tensor, State]:
        ways = x if isinstance(x, tuple) else (x, x, x)
        return sum(linear(way) for linear, way in zip(self.maps, ways, strict=True)), side


READERS = (Reader(), Reader())


def random_state(plan: ModelPlan, index: int) -> State:
    entries = plan.residual_of(min(index // 2, SHAPE.layers - 1)).state_spec(index)
    return tuple(torch.randn(2, SHAPE.context, *entry.shape, requires_grad=True) for entry in entries)


def measured(call: Callable, model: GPT, inputs: State = ()) -> Cost:
    """FLOPs and kept numbers per token. What a site gives to later readers is not among what it keeps."""
    owned = [t for module in (model, *READERS) for t in (*module.parameters(), *module.buffers())]
    kept = saved_bytes(call, (*inputs, *owned))
    return Cost(flops=count_flops(call) / TOKENS, saved=kept / BYTES / TOKENS)


def measured_parts(spec: str) -> dict[str, tuple[Cost, Cost]]:
    """Of each site, and of opening and closing the stream: what is counted and what is promised."""
    model = model_of(spec, SHAPE, dtype=torch.float32)
    plan, parts = model.plan, {}
    for layer in range(SHAPE.layers):
        variant = plan.residual_of(layer)
        for place in variant.places(layer):
            site, readers = model.parts[2 + layer].sites[place.kind], READERS[: len(SUBLAYERS[place.kind])]
            state = random_state(plan, place.index)
            found = measured(lambda: site(state, (), *readers), model, state)
            parts[f"layer {layer} {place.kind}"] = found, variant.cost(place)
    x0, last = torch.randn(2, SHAPE.context, SHAPE.width, requires_grad=True), random_state(plan, 2 * SHAPE.layers)
    opened = measured(lambda: model.parts[1].opening(x0), model, (x0,))
    closed = measured(lambda: model.parts[-1](last), model, last)
    parts["opening"] = opened, plan.residual_of(0).opening_cost()
    parts["closing"] = closed, plan.residual_of(SHAPE.layers - 1).closing_cost()
    return parts


@cache
def measured_whole(spec: str) -> Cost:
    """Of a whole model's forward."""
    model = model_of(spec, SHAPE, dtype=torch.float32)
    return measured(lambda: model(IDX[:, :-1], IDX[:, 1:]), model)


@cache
def vanilla_parts() -> dict[str, Cost]:
    return {part: found for part, (found, _) in measured_parts("vanilla").items()}


def vanilla_of(part: str) -> Cost:
    """Vanilla's cost of the same part: a site that calls two sublayers stands beside two of vanilla's."""
    *layer, kind = part.split()
    return sum((vanilla_parts()[" ".join([*layer, name])] for name in SUBLAYERS.get(kind, (kind,))), Cost())


def assert_close(found: float, promised: float, what: str) -> None:
    assert abs(found - promised) <= max(0.05 * abs(promised), SLACK), f"{what}: {found:.1f}, promised {promised}"


def test_what_vanilla_costs():
    """A LayerNorm, of which result [C], mean and deviation are kept, and a sum; beside them the maps and their sums."""
    width = SHAPE.width
    maps = 3 * 2 * width**2 + 3 * width  # sum() starts from 0
    assert {part: (cost.flops, cost.saved) for part, cost in vanilla_parts().items()} == {
        **{f"layer {n} {kind}": (8 * width + maps, width + 2) for n in range(6) for kind in SUBLAYERS["parallel"]},
        "opening": (0, 0),
        "closing": (7 * width, 2),
    }


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_parameters_are_those_counted_by_hand(row):
    plan = ModelPlan(PRESETS["gpt2-medium"], residual=row.spec)
    added = sum(parameters_by_component(plan).values()) - 354_823_168  # GPT-2 Medium's
    assert added == row.added_parameters == residual_cost(plan).parameters


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_each_part_costs_what_is_promised(row):
    for part, (found, promised) in measured_parts(row.spec).items():
        added = found + vanilla_of(part) * -1
        assert_close(added.flops, promised.flops, f"FLOPs per token of {part}")
        assert_close(added.saved, promised.saved, f"numbers kept per token by {part}")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_whole_model_costs_what_is_promised(row):
    added = measured_whole(row.spec) + measured_whole("vanilla") * -1
    promised = residual_cost(ModelPlan(SHAPE, residual=row.spec))
    assert_close(added.flops, promised.flops, "FLOPs per token")
    assert_close(added.saved, promised.saved + promised.written, "numbers kept per token")


@pytest.mark.parametrize("layers", [1, 3, 6])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_state_is_the_one_that_is_specified_and_all_of_it_is_read(row, layers):
    """At every site and where the stream is closed: names for every tensor, their shapes, no tensor twice, and from
    there on a path to the loss for each."""
    shape, tokens = SHAPE.model_copy(update={"layers": layers, "context": 8}), IDX[:, :9]
    model = model_of(row.spec, shape, dtype=torch.float32)
    entering: dict[int, State] = {}

    def watch(index: int, length: int):
        def hook(module, arguments):
            tensors, *rest = arguments
            # Views, so that a gradient is one of what is read from here on.
            entering[index] = tuple(tensor.view_as(tensor) for tensor in tensors)
            assert len({id(tensor) for tensor in tensors}) == len({t.data_ptr() for t in tensors}) == length
            return entering[index], *rest

        return hook

    for layer in range(layers):
        variant = model.plan.residual_of(layer)
        for place in variant.places(layer):
            site = model.parts[2 + layer].sites[place.kind]
            site.register_forward_pre_hook(watch(place.index, len(variant.state_spec(place.index))))
    last = model.plan.residual_of(layers - 1)
    model.parts[-1].register_forward_pre_hook(watch(2 * layers, len(last.state_spec(2 * layers))))

    loss = loss_of(model, tokens)
    for index, state in entering.items():
        spec = model.plan.residual_of(min(index // 2, layers - 1)).state_spec(index)
        assert [tensor.shape for tensor in state] == [(2, shape.context, *entry.shape) for entry in spec], index
        assert len({entry.name for entry in spec}) == len(spec), index
        gradients = torch.autograd.grad(loss, state, allow_unused=True, retain_graph=True)
        unread = [str(entry) for entry, gradient in zip(spec, gradients) if gradient is None]
        assert unread == [], f"never read from sublayer {index} on"
