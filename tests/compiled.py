"""A compiled model beside itself."""

import pytest
import torch
from small_models import IDX, gradients_of, loss_of

from megaresid.model.compile import compile_model
from megaresid.model.gpt import GPT


def assert_compiles_to_one_graph(model: GPT, tolerance: float, idx: torch.Tensor = IDX, **options) -> None:
    """The whole model compiled: loss and gradients are those of the model itself."""
    loss = loss_of(model, idx)
    expected = gradients_of(model, loss)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled_loss = loss_of(compile_model(model, fullgraph=True, **options), idx)
    found = gradients_of(model, compiled_loss)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert compiled_loss.item() == pytest.approx(loss.item(), rel=tolerance)
    scale = max(gradient.norm() for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        wanted = torch.tensor(0.0) if gradient is None else gradient
        given = torch.tensor(0.0) if found[name] is None else found[name]
        assert (given - wanted).norm() < tolerance * max(wanted.norm(), 1e-3 * scale), name
