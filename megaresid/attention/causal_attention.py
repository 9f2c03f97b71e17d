"""Causal attention over all tokens, a window, or a document, by PyTorch's fused kernels."""

import torch
from torch.nn.functional import pad, scaled_dot_product_attention


def causal_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None = None,
    segment: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """o_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s over the tokens s that t sees: [B, H, T, D].

    k and v [B, H, S, D] are S tokens, of which the queries are the last T. t sees s <= t, only the ``window`` last of
    them, and only those of its own document (``segment`` int32 [B, S]). Without either, the kernels need no mask; with
    one it takes a byte per pair of query and key, and a window much shorter than the text only 2 window bytes a query.
    """
    queries, keys = q.shape[2], k.shape[2]
    if window is not None and window >= keys:
        window = None
    if window is None and segment is None and queries in (1, keys):
        return scaled_dot_product_attention(q, k, v, is_causal=queries > 1, dropout_p=dropout)
    if window is not None and queries == keys > 2 * window:
        return _in_blocks(q, k, v, window, segment, dropout)
    token = torch.arange(keys, device=q.device)
    mask = _seen(token[keys - queries :], token, window)
    if segment is not None:
        mask = mask & (segment[:, keys - queries :, None] == segment[:, None])[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def _seen(query: torch.Tensor, key: torch.Tensor, window: int | None) -> torch.Tensor:
    """[..., T, S] for numbers of tokens [..., T] and [..., S]."""
    back = query[..., :, None] - key[..., None, :]
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _in_blocks(q, k, v, window, segment, dropout):
    """Blocks of ``window`` queries, each beside the keys of its own and of the block before: linear in T."""
    batch, heads, length, _ = q.shape
    blocks = -(-length // window)
    tail = blocks * window - length
    token = torch.arange(-window, blocks * window, device=q.device)
    query, key = token[window:].unflatten(0, (blocks, window)), token.unfold(0, 2 * window, window)
    mask = _seen(query, key, window) & (key >= 0)[:, None]  # [blocks, window, 2 window]; the padding sees itself
    if segment is not None:
        padded = pad(segment, (window, tail))
        mine, theirs = padded[:, window:].unflatten(1, (blocks, window)), padded.unfold(1, 2 * window, window)
        mask = (mask & (mine[..., None] == theirs[..., None, :])).flatten(0, 1)
    else:
        mask = mask.repeat(batch, 1, 1)

    def beside(z):  # [B, H, T, D] -> [B blocks, H, 2 window, D]
        return pad(z, (0, 0, window, tail)).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1)

    q = pad(q, (0, 0, 0, tail)).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    o = scaled_dot_product_attention(q, beside(k), beside(v), attn_mask=mask[:, None], dropout_p=dropout)
    return o.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
