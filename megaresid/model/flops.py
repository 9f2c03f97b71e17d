"""What a token costs, and what the machine could do: the two halves of MFU.

FLOPs are those of the model's definition: a multiply-add counts 2, causal attention counts only the tokens that are
seen, padding rows of the vocabulary and recomputation count nothing. Training is counted as three forwards.
"""

import re

from megaresid.model.layer import SUBLAYERS
from megaresid.model.mlp import MLP
from megaresid.model.plan import ModelPlan
from megaresid.residual.stream import Place

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets (never the figures "with sparsity").
PEAK_FLOPS = {"H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12}


def forward_flops_per_token(plan: ModelPlan) -> dict[str, int]:
    """FLOPs per token of one forward pass at the full context, by component."""
    shape = plan.shape
    flops = dict.fromkeys(("attention", "mlp", "residual", "head"), 0)
    for layer in range(shape.layers):
        mixer, options = plan.mixer_class(layer)
        flops["attention"] += mixer.flops_per_token(shape, options)
        flops["mlp"] += MLP.flops_per_token(shape)
        for offset, kind in enumerate(SUBLAYERS):
            place = Place(len(SUBLAYERS) * layer + offset, layer, kind)
            flops["residual"] += plan.residual_of(layer).flops_per_token(place)
    flops["head"] = 2 * shape.width * shape.vocab_size
    return flops


def training_flops_per_token(plan: ModelPlan) -> int:
    """FLOPs per token of forward and backward: three times the forward's."""
    return 3 * sum(forward_flops_per_token(plan).values())


def peak_flops(device_name: str, dtype: str | None) -> float | None:
    """The dense peak in FLOP/s of a device by its name, for matrix products in ``dtype``.

    None where it is not known, never a guess: another dtype than bfloat16, a part of a GPU (MIG), another device.
    """
    if dtype != "bfloat16" or "MIG" in device_name:
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", device_name)), None)
