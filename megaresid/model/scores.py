"""Log-probabilities of given tokens, and whether each is the likeliest: what evaluation asks of the output head.

Logits are made only where a target is wanted, and of no more than a block of targets at once. Often little of a text is
asked for: a multiple-choice question has some ten tokens of answer behind a hundred of context.
"""

import torch
from torch import Tensor

from megaresid.model.loss import block_tokens, product_dtype_of


@torch.no_grad()
def target_scores(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Of each wanted target, log softmax(hidden @ weight[:vocab_size].T) and whether argmax is the target.

    Args:
        hidden: [..., C]; fp32, fp64 or bf16.
        weight: [V, C] of the same dtype unless autocast is on. Rows from ``vocab_size`` on are padding: outside the
            softmax, and never the likeliest.
        targets: int64 below ``vocab_size``, [...], or [..., K] for several of one position; a negative one is not
            wanted. They may stay on the CPU: then nothing waits for a GPU to find out which are wanted.

    Returns:
        fp32 [n] (fp64 for fp64 inputs) and bool [n], of the wanted targets in row-major order. Matrix products are in
        the dtype that the loss takes them in, the softmax in fp32. Of tokens that are equally likely the first is the
        likeliest, as ``torch.argmax`` has it.

    Raises:
        ValueError: shapes do not fit. TypeError: a dtype that the loss would refuse.
    """
    several = targets.ndim == hidden.ndim
    if targets.shape[: hidden.ndim - 1] != hidden.shape[:-1] or targets.ndim - several != hidden.ndim - 1:
        raise ValueError(f"hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} do not fit")
    product_dtype, device = product_dtype_of(hidden, weight), hidden.device
    wanted = (targets.flatten() >= 0).nonzero()[:, 0]
    target = targets.flatten()[wanted].to(device, non_blocking=True)[:, None]
    position = (wanted // targets.shape[-1] if several else wanted).to(device, non_blocking=True)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    log_p = hidden.new_empty(len(target), dtype=torch.promote_types(hidden.dtype, torch.float32))
    greedy = torch.empty(len(target), dtype=torch.bool, device=device)
    block = min(block_tokens(device.type, len(weight)), len(target))
    product_weight = weight.to(product_dtype).t()
    logits = hidden.new_empty(block, len(weight), dtype=product_dtype)
    for start in range(0, len(target), max(block, 1)):
        rows = slice(start, start + block)
        h = hidden[position[rows]].to(product_dtype)
        # The product is of all rows: their number is a multiple that suits a GPU, the vocabulary's is odd.
        p = torch.mm(h, product_weight, out=logits[: len(h)])[:, :vocab_size].to(log_p.dtype)
        top, likeliest = p.max(1, keepdim=True)
        greedy[rows] = (likeliest == target[rows])[:, 0]
        above_top = p.gather(1, target[rows]) - top
        log_p[rows] = (above_top - p.sub_(top).exp_().sum(1, keepdim=True).log())[:, 0]
    return log_p, greedy
