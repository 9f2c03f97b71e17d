"""The one recurrence behind the linear mixers.

With a state S [K, V] a head, decay alpha_t = exp(g_t) and S~_t = diag(alpha_t) S_{t-1}::

    with beta:     S_t = S~_t + beta_t k_t (v_t - S~_t^T k_t)^T        o_t = scale S_t^T q_t
    without beta:  S_t = S~_t + k_t v_t^T

    g \\ beta      none                                   [B, T, H]
    none          linear attention                       delta rule (DeltaNet)
    [H]           retention, lightning attention         (gated delta rule of constant decay)
    [B, T, H]     simple GLA, Mamba-2                    gated delta rule
    [B, T, H, K]  GLA, HGRN2                             Kimi delta attention

A published mixer is a row of settings of it. Layout, scale and the decay's natural logarithm are those of
flash-linear-attention.
"""

import torch

from megaresid.attention.chunks import by_chunks


def recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    state: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``o`` [B, T, H, V] in v's dtype and the final state [B, H, K, V].

    q, k [B, T, H, K], v [B, T, H, V]; g <= 0 and beta as in the table above; ``scale`` is K^-1/2 unless given. It
    computes, and the state is, in fp32 (fp64 for fp64), also under autocast. ``state`` is where the first token starts
    from. ``segment`` int32 [B, T] keeps documents apart: the state starts from zero at every token whose number is not
    that of the token before; ``state`` belongs to the document of the first token.

    On a GPU it runs in flash-linear-attention's kernels where ``kernels/routes.py`` says so: tiles are then multiplied
    in the inputs' type, or autocast's, and their sums and the state are in fp32.
    """
    form = by_steps if q.shape[1] == 1 else by_chunks
    if q.is_cuda and form is by_chunks:
        from megaresid.attention.kernels.calls import form_of  # which takes long to import

        form = form_of(q, k, v, g, beta) or form
    return form(q, k, v, g, beta, scale=scale, state=state, segment=segment)


def by_steps(q, k, v, g=None, beta=None, *, scale=None, state=None, segment=None):
    """The definition, token by token; what ``recurrence`` runs for one token. Arguments and results are its."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if state is None:
        state = q.new_zeros(*q.shape[::2], k.shape[-1], v.shape[-1], dtype=wide)
    outputs = []
    with torch.autocast(q.device.type, enabled=False):
        state = state.to(wide)
        for t in range(q.shape[1]):
            q_t, k_t, v_t = (x[:, t].to(wide) for x in (q, k, v))  # [B, H, K or V]
            if segment is not None and t > 0:
                same = segment[:, t] == segment[:, t - 1]
                state = state.masked_fill(~same[:, None, None, None], 0)
            if g is not None:
                decay = (g if g.dim() == 1 else g[:, t]).to(wide).exp()
                state = state * (decay[..., None] if g.dim() == 4 else decay[..., None, None])
            if beta is not None:
                v_t = beta[:, t, :, None].to(wide) * (v_t - torch.einsum("bhkv,bhk->bhv", state, k_t))
            state = state + k_t[..., :, None] * v_t[..., None, :]
            outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q_t))
    return torch.stack(outputs, 1).to(v.dtype), state
