"""Constant decay for each head: retention and lightning attention."""

import torch

from megaresid.attention.activations import ActivationName
from megaresid.attention.cache import Cache
from megaresid.attention.gated_mixer import GatedMixer, GatedOptions
from megaresid.attention.mixer import MIXERS, SideSpec
from megaresid.attention.rotary import rotate
from megaresid.errors import UserError
from megaresid.model.presets import ModelShape


@MIXERS.register("retention")
class Retention(GatedMixer):
    """o_t = K^-1/2 sum_{s<=t} gamma^(t-s) (R_t q_t . R_s k_s) v_s, y = W_o (norm(o) * swish(W_g x)).

    Multi-scale retention (Sun et al. 2023, arXiv 2307.08621, equations 5, 6 and 8): gamma = 1 - 2^(-5-h) for head
    h = 0, 1, ..., R_t the rotation of ``rotary.py``.

    4 C^2 parameters: 4.19 M at width 1024. The paper and flash-linear-attention have expand_k=1 and expand_v=2: 8.39 M.
    """

    citation = "Sun et al. 2023, arXiv 2307.08621"
    fidelity = "reconstructed: by default keys and values are half as wide, and the norm of a head has weights"
    Options = GatedOptions
    decays = "constant"

    def placed(
        self, q: torch.Tensor, k: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(q.shape[1], device=q.device)
        if cache is not None:
            before = cache.tensors.get("tokens", positions.new_zeros(()))
            positions = positions + before
            cache.tensors["tokens"] = before + q.shape[1]
        return rotate(q, positions), rotate(k, positions)

    def decay(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log1p(-torch.exp2(-5 - head_numbers(x, self.heads)))

    @classmethod
    def check(cls, shape: ModelShape, options: GatedOptions) -> None:
        if (keys := cls.sizes(shape, options).keys) % 2:
            raise UserError(
                f"attention 'retention': the keys of a head have width {keys}, and only an even one can be rotated: "
                "change heads or expand_k"
            )


class LightningOptions(GatedOptions):
    feature_map: ActivationName = "swish"
    """A function of queries and keys."""
    gate_fn: ActivationName = "identity"
    """The function of the output gate."""


@MIXERS.register("lightning")
class LightningAttention(GatedMixer):
    """o_t = K^-1/2 sum_{s<=t} lambda^(t-s) (phi(q_t) . phi(k_s)) v_s, y = W_o (norm(o) * W_g x), phi = swish.

    The attention of TransNormerLLM (Qin et al. 2023, arXiv 2307.14995; computed in blocks as Lightning Attention, 2024,
    arXiv 2401.04658 and 2405.17381): lambda = exp(-8 h / H (1 - l / L)) for head h = 0, 1, ... of H and layer l = 0, 1,
    ... of L, so that head 0 forgets nothing.

    4 C^2 parameters: 4.19 M at width 1024.
    """

    citation = "Qin et al. 2024, arXiv 2401.04658"
    fidelity = "reconstructed: no rotation in the first layer; half as wide keys; a norm with weights for each head"
    Options = LightningOptions
    decays = "constant"

    def __init__(self, shape: ModelShape, options: LightningOptions, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        self.slope = 8 / self.heads * (1 - layer / shape.layers)

    def decay(self, x: torch.Tensor) -> torch.Tensor:
        return -self.slope * head_numbers(x, self.heads)


def head_numbers(x: torch.Tensor, heads: int) -> torch.Tensor:
    """0, 1, ... [H] in the dtype of a decay, computed where x lies: a buffer would be rounded with the model."""
    return torch.arange(heads, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
