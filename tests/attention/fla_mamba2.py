"""flash-linear-attention's Mamba-2 beside ours, which has the same parameters, cut into those of q, k, v and so on."""

import torch
from fla_layers import error, gradients_of

from megaresid.attention.mamba2 import Mamba2, Options
from megaresid.model.presets import ModelShape

WIDTH, HEADS, EXPAND, STATE = 32, 2, 2, 16
INNER = WIDTH * EXPAND
ROWS = {"g": INNER, "v": INNER, "k": STATE, "q": STATE, "dt": HEADS}
"""Of in_proj; of conv1d those of v, k and q."""


def real() -> torch.nn.Module:
    from fla.layers import Mamba2 as Real

    return Real(
        hidden_size=WIDTH, num_heads=HEADS, head_dim=INNER // HEADS, expand=EXPAND, state_size=STATE, layer_idx=0
    )


def cut(whole: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From names and shapes of the real layer to ours."""
    parts = {"o_proj.weight": whole["out_proj.weight"], "norm.weight": whole["norm.weight"]}
    parts |= {name: whole[name] for name in ("A_log", "dt_bias", "D")}
    projections = whole["in_proj.weight"].split(list(ROWS.values()))
    parts |= {f"{name}_proj.weight": rows for name, rows in zip(ROWS, projections, strict=True)}
    for kind in ("weight", "bias"):
        convolutions = whole[f"conv1d.{kind}"].split([ROWS[name] for name in "vkq"])
        parts |= {f"{name}_conv1d.{kind}": rows for name, rows in zip("vkq", convolutions, strict=True)}
    return parts


def errors() -> dict[str, float]:
    """As ``fla_layers.errors``."""
    torch.manual_seed(0)
    layer = real().float()
    mixer = Mamba2(
        ModelShape(layers=1, heads=HEADS, width=WIDTH, context=128), Options(expand=EXPAND, state_size=STATE), 0
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    mixer.load_state_dict(cut(layer.state_dict()), strict=True)
    x = torch.randn(2, 70, WIDTH, requires_grad=True)
    expected, found = layer(x)[0], mixer(x, ())[0]
    weights = torch.randn_like(expected)
    wanted, gradients = gradients_of(layer, x, weights * expected), gradients_of(mixer, x, weights * found)
    wanted = {"x": wanted.pop("x")} | cut(wanted)
    assert wanted.keys() == gradients.keys()
    return {"outputs": error(found, expected)} | {name: error(gradients[name], wanted[name]) for name in wanted}
