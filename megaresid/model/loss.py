"""The language-model loss: output projection, softmax and cross-entropy in one, block by block of tokens.

The logits of one batch are the largest tensor of a small model by far (2,048 x 50,304 floats are 412 MB), and the loss
is a scalar, so its gradients need not wait for the backward pass: the forward walks over blocks of tokens, and for each
takes logits, loss and both gradients while the block is at hand. The backward only scales them. It never reads the
weight, which ZeRO-3 may have freed by then.

The walk is a ``torch.library`` operator inside an ``autograd.Function``. To ``torch.compile`` it is one node, where a
traced loop would be unrolled over the blocks, lose its in-place updates, and be compiled anew for each length.
"""

import torch
from torch import Tensor

# On a CPU fewer tokens re-read the weight's gradient too often, and the logits of more leave the cache.
CPU_BLOCK_TOKENS = 256
GPU_BLOCK_BYTES = 1 << 30
GPU_LOGIT_BYTES = 8  # under autocast: bf16 from the product, fp32 for the softmax, bf16 for the next products


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Cross-entropy of ``softmax(hidden @ weight[:vocab_size].T)``: the sum over valid tokens of ``-log p(target)``,
    divided by ``targets.numel()``.

    The denominator counts positions, valid or not. It is then known before the data is, and equal for every micro-batch
    of one shape, so the mean over micro-batches, ranks and padded dummy windows is exactly the sum over all tokens by a
    constant; a mean over valid tokens only would weigh a token by the company it happens to keep.

    Args:
        hidden: [..., C]; fp32, fp64 or bf16.
        weight: [V, C] of the same dtype unless autocast is on. Rows from ``vocab_size`` on are padding: outside the
            softmax, and their gradient is exactly zero.
        targets: [...] int64 below ``vocab_size``; a negative one is ignored. A padding row as target costs infinity.
        vocab_size: number of tokens that can be predicted, at most V.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs). Under autocast, and for bf16 inputs, the matrix products run in bf16;
        softmax, loss and the sum of the weight's gradient over blocks are fp32. Gradients have their tensor's dtype.

    Raises:
        ValueError: shapes do not fit. TypeError: a dtype that is not listed (fp16 would underflow: the gradients are
        taken before any loss scale is applied). RuntimeError: a gradient of the gradient is asked for.
    """
    if targets.shape != hidden.shape[:-1] or weight.shape[1:] != hidden.shape[-1:] or not 0 < vocab_size <= len(weight):
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)} and "
            f"vocab_size {vocab_size} do not fit"
        )
    product_dtype = product_dtype_of(hidden, weight)
    tokens = hidden.reshape(-1, hidden.shape[-1])
    # Asked here: inside a Function gradients are always off, and ``needs_input_grad`` is true in evaluation as well.
    wants_hidden, wants_weight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    return _LinearCrossEntropy.apply(
        tokens, weight, targets.reshape(-1), vocab_size, product_dtype, wants_hidden, wants_weight
    )


def full_logits(hidden: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    """All logits, for evaluation and sampling: [..., C] and [V, C] to [..., vocab_size], without the padding."""
    return torch.nn.functional.linear(hidden, weight[:vocab_size])


def product_dtype_of(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the head's matrix products: autocast's where it is on, fp64 apart, else that of both tensors. Raises
    TypeError for another than fp32, fp64 and bf16, and for two dtypes without autocast."""
    device, product_dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        product_dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype != weight.dtype:
        raise TypeError(f"hidden is {hidden.dtype} and weight {weight.dtype}: without autocast they must be equal")
    if product_dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"the loss takes its products in float32, float64 or bfloat16, not {product_dtype}")
    return product_dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, vocab_size, product_dtype, wants_hidden, wants_weight):
        loss, d_hidden, d_weight = _walk(hidden, weight, targets, vocab_size, product_dtype, wants_hidden, wants_weight)
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        # once_differentiable would let this pass, the saved gradients being constants to it, and be wrong.
        if torch.is_grad_enabled():
            raise RuntimeError("linear_cross_entropy has no second derivative: do not use create_graph=True")
        # Not in place: a second backward through a retained graph must find them as they were.
        d_hidden, d_weight = (
            saved * d_loss if wanted else None for saved, wanted in zip(ctx.saved_tensors, ctx.needs_input_grad)
        )
        return d_hidden, d_weight, None, None, None, None, None


@torch.library.custom_op("megaresid::linear_cross_entropy", mutates_args=())
def _walk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    product_dtype: torch.dtype,
    wants_hidden: bool,
    wants_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of hidden [N, C] and its gradients [N, C] and [V, C]; one that is not wanted is empty."""
    sum_dtype, positions = torch.promote_types(hidden.dtype, torch.float32), len(hidden)
    loss = hidden.new_zeros((), dtype=sum_dtype)
    d_hidden = hidden.new_empty(hidden.shape if wants_hidden else 0)
    d_weight = weight.new_zeros(weight.shape if wants_weight else 0, dtype=sum_dtype)
    block = min(block_tokens(hidden.device.type, len(weight)), positions)
    with torch.autocast(hidden.device.type, enabled=False):
        product_weight = weight.to(product_dtype)
        logits = hidden.new_empty(block, len(weight), dtype=product_dtype)
        for start in range(0, positions, block):
            rows = slice(start, start + block)
            h, valid, target = hidden[rows], targets[rows, None] >= 0, targets[rows, None].clamp(min=0)
            p = torch.mm(h.to(product_dtype), product_weight.t(), out=logits[: len(h)]).to(sum_dtype)
            p[:, vocab_size:] = -torch.inf
            top, target_logit = p.amax(1, keepdim=True), p.gather(1, target)
            total = p.sub_(top).exp_().sum(1, keepdim=True)
            loss += torch.where(valid, total.log() + top - target_logit, 0).sum()
            if not (wants_hidden or wants_weight):
                continue

            # p / total is the softmax; the division, like the zero of an ignored token, is left to the narrow sides.
            p = p.scatter_add_(1, target, -total).to(product_dtype)
            scale = torch.where(valid, 1 / (total * positions), 0)
            if wants_hidden:
                d_hidden[rows] = torch.mm(p, product_weight) * scale
            if wants_weight:
                _add_product(d_weight, p.t(), (h * scale).to(product_dtype))
    return loss / max(positions, 1), d_hidden, d_weight.to(weight.dtype)


@_walk.register_fake
def _(hidden, weight, targets, vocab_size, product_dtype, wants_hidden, wants_weight):
    loss = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return (
        loss,
        hidden.new_empty(hidden.shape if wants_hidden else 0),
        weight.new_empty(weight.shape if wants_weight else 0),
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in the precision of ``total``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def block_tokens(device: str, vocabulary: int) -> int:
    """How many tokens' logits over ``vocabulary`` rows are held at once."""
    return CPU_BLOCK_TOKENS if device == "cpu" else max(1, GPU_BLOCK_BYTES // (GPU_LOGIT_BYTES * vocabulary))
