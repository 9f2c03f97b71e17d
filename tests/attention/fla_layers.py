"""flash-linear-attention's own layers beside ours, for ``test_strict_load``."""

import json
from pathlib import Path

import define_delta
import define_linear
import torch

from megaresid.attention.mixer import MIXERS, Mixer
from megaresid.model.presets import ModelShape
from megaresid.spec import parse_pattern

WIDTH, HEADS = 32, 2
FLA = define_delta.FLA | define_linear.FLA
"""By our spec, the name of fla's layer and the options that make it the same."""

LONG, SHORT = 70, 64
"""Tokens: more than fla's chunk of 64; but of DeltaNet as many, because its chunked kernel takes no fp32 and up to 64
another runs."""

RECORD = Path(__file__).with_name("fla_state_dicts.json")


def ours(spec: str) -> Mixer:
    """The mixer of ``spec``; its parameters are not filled."""
    ((_, component),) = parse_pattern(spec).terms
    cls, options = MIXERS.resolve(component)
    shape = ModelShape(layers=1, heads=HEADS, width=WIDTH, context=128)
    cls.check(shape, options)
    return cls.make(shape, options, 0)


def theirs(spec: str) -> torch.nn.Module:
    import fla.layers
    from fla.layers.simple_gla import SimpleGatedLinearAttention  # the one that fla.layers does not export

    name, options = FLA[spec]
    cls = getattr(fla.layers, name, SimpleGatedLinearAttention)
    assert cls.__name__ == name
    return cls(hidden_size=WIDTH, layer_idx=0, **options)


def shapes(layer: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in layer.state_dict().items()}


def their_shapes(spec: str) -> dict[str, list[int]]:
    return shapes(theirs(spec))


def record() -> None:
    """Write down the names and shapes of all of fla's layers, a line a layer."""
    lines = [f"{json.dumps(spec)}: {json.dumps(their_shapes(spec))}" for spec in FLA]
    RECORD.write_text("\n".join(["{", ",\n".join(lines), "}", ""]))


def errors(spec: str) -> dict[str, float]:
    """Largest error of ours, relative to the largest entry: of outputs, and of the gradients of the input and every
    parameter. fp32; ours has loaded the real layer's state dict, which is away from its start.

    Decays are not the fastest that fla starts with: where exp(A_log) is 16, its differences of sums of log-decays round
    off 6e-5 of the gradient of A_log, ours 4e-6 (both against fp64).
    """
    torch.manual_seed(0)
    real, mixer = theirs(spec).float(), ours(spec)
    with torch.no_grad():
        for name, parameter in real.named_parameters():
            parameter += 0.2 * torch.randn_like(parameter)
            if name == "A_log":
                parameter.clamp_(max=1)
    mixer.load_state_dict(real.state_dict(), strict=True)
    x = torch.randn(1, SHORT if FLA[spec][0] == "DeltaNet" else LONG, WIDTH, requires_grad=True)
    expected, found = real(x)[0], mixer(x, ())[0]
    weights = torch.randn_like(expected)
    wanted, gradients = gradients_of(real, x, weights * expected), gradients_of(mixer, x, weights * found)
    assert wanted.keys() == gradients.keys()
    return {"outputs": error(found, expected)} | {name: error(gradients[name], wanted[name]) for name in wanted}


def gradients_of(layer: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {"x": x} | dict(layer.named_parameters())
    return dict(zip(named, torch.autograd.grad(y.sum(), list(named.values()))))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
