"""Vanilla through the interface is the block that one would write by hand: the same operations, the same tensors kept."""

import torch
from small_models import IDX, SHAPE
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from megaresid.attention.softmax import Softmax
from megaresid.model.gpt import build
from megaresid.model.mlp import MLP
from megaresid.model.plan import ModelPlan


class Operations(TorchDispatchMode):
    """Every aten operation that runs, with the shapes of the tensors that it gives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        tensors = [x for x in (given if isinstance(given, (tuple, list)) else (given,)) if isinstance(x, torch.Tensor)]
        self.seen.append((str(function), [tuple(x.shape) for x in tensors]))
        return given


class Block(nn.Module):
    """x + f(norm(x)), twice."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Softmax(SHAPE, Softmax.Options(), 0), MLP(SHAPE)
        self.norm_1, self.norm_2 = nn.LayerNorm(SHAPE.width), nn.LayerNorm(SHAPE.width)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x), ())[0]
        return x + self.mlp(self.norm_2(x), ())[0]


def by_hand(model) -> nn.Module:
    """The body of a vanilla model (what stands between the embeddings and the head) with its values, by hand."""
    blocks = [Block() for _ in range(SHAPE.layers)]
    for block, layer in zip(blocks, model.parts[2:-1], strict=True):
        block.attention.load_state_dict(layer.attention.state_dict())
        block.mlp.load_state_dict(layer.mlp.state_dict())
        block.norm_1.load_state_dict(layer.sites["attention"].norm.state_dict())
        block.norm_2.load_state_dict(layer.sites["mlp"].norm.state_dict())
    final = nn.LayerNorm(SHAPE.width)
    final.load_state_dict(model.parts[-1].norm.state_dict())
    return nn.Sequential(*blocks, final)


def run(body, x) -> tuple[torch.Tensor, list, list]:
    """The output, all operations of forward and backward in order, and what is kept in between."""
    kept, x = [], x.clone().requires_grad_()

    def keep(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype, tensor.nbytes))
        return tensor

    with Operations() as operations:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = body(x)
        output.pow(2).sum().backward()
    return output.detach(), operations.seen, kept


def test_the_same_operations_and_the_same_saved_tensors_as_a_block_written_by_hand():
    model = build(ModelPlan(SHAPE), seed=0)
    body = nn.Sequential(*model.parts[2:])
    x = torch.randn(*IDX.shape, SHAPE.width, generator=torch.Generator().manual_seed(1))
    expected, expected_operations, expected_kept = run(by_hand(model), x)
    found, operations, kept = run(body, x)
    assert torch.equal(found, expected)
    assert [name for name, _ in operations].count("aten.native_layer_norm_backward.default") == 2 * SHAPE.layers + 1
    assert operations == expected_operations
    assert kept == expected_kept
