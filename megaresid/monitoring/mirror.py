"""A model's modules once more, over the very same parameters."""

import torch

from megaresid.model.gpt import GPT


def mirror(model: GPT) -> GPT:
    """A model of the same plan, in evaluation mode, whose parameters and buffers are those of ``model``.

    What is hooked to it, or run through it, never meets the hooks, graphs and modes of the model that trains. Under
    ZeRO-3 its parameters are as little whole as the model's.
    """
    with torch.device("meta"):
        copy = GPT(model.plan)
    for mine, theirs in zip(copy.modules(), model.modules(), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(mine, name, parameter)
        for name, buffer in theirs.named_buffers(recurse=False):
            setattr(mine, name, buffer)
    return copy.eval()
