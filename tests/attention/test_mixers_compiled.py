"""Every mixer in a whole model that is compiled as one graph, over more than one chunk of its recurrence."""

import pytest
import torch
from compiled import assert_compiles_to_one_graph
from mixer_table import FAMILY_HEADS, quick
from small_models import SHAPE, model_of

LENGTH = 70
IDX = torch.randint(SHAPE.vocab_size, (1, LENGTH + 1), generator=torch.Generator().manual_seed(0))
LONG = SHAPE.model_copy(update={"layers": 2, "context": LENGTH})


@pytest.mark.parametrize("row", quick(FAMILY_HEADS), ids=str)
def test_the_whole_model_is_one_graph(row):
    model = model_of("vanilla", LONG, away=0.1, attention=row.spec)
    assert_compiles_to_one_graph(model, 1e-9, IDX, backend="eager")


@pytest.mark.full
@pytest.mark.parametrize("row", quick(FAMILY_HEADS), ids=str)
def test_the_whole_model_compiles_with_inductor(row):
    """All kernels in one file of C++ and not optimized: most of the time is the compiler's."""
    options = {"cpp_wrapper": True, "aot_inductor.debug_compile": True}
    model = model_of("vanilla", LONG, away=0.1, attention=row.spec, dtype=torch.float32)
    assert_compiles_to_one_graph(model, 1e-4, IDX, options=options)
