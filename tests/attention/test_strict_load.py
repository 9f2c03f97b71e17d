"""A state dict of flash-linear-attention's layer loads into ours strictly, and both then compute the same.

``fla_state_dicts.json`` holds the names and shapes of the real layers of version 0.6.0. It was recorded, where that and
Triton are installed, in this folder by

    PYTHONPATH=..:../.. python -c "import fla_layers; fla_layers.record()"
"""

import json

import interpreter
import pytest
from fla_layers import FLA, RECORD, errors, ours, shapes, their_shapes

RECORDED = json.loads(RECORD.read_text())


@pytest.mark.parametrize("spec", FLA)
def test_names_and_shapes_are_those_of_the_real_layer(spec):
    assert shapes(ours(spec)) == RECORDED[spec]


def test_every_layer_that_must_load_is_there():
    layers = {name for name, _ in FLA.values()}
    assert {"DeltaNet", "GatedDeltaNet", "GatedLinearAttention", "KimiDeltaAttention", "MultiScaleRetention"} <= layers
    assert RECORDED.keys() == FLA.keys()


@pytest.fixture(scope="module")
def interpreted():
    if interpreter.MISSING:
        pytest.skip(interpreter.REASON)
    process = interpreter.Interpreter()
    yield process
    process.close()


@pytest.mark.full
@pytest.mark.parametrize("spec", FLA)
def test_the_real_layer_is_as_recorded(interpreted, spec):
    assert interpreted.run(their_shapes, spec) == RECORDED[spec]


@pytest.mark.full
@pytest.mark.parametrize("spec", FLA)
def test_outputs_and_gradients_are_those_of_the_real_layer(interpreted, spec):
    """By the real kernels, which Triton interprets, in fp32."""
    found = interpreted.run(errors, spec)
    assert all(error < 2e-5 for error in found.values()), found
