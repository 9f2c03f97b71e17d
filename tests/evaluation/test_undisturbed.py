"""What an evaluation does to the process and the model is undone, one thing at a time, when it ends by an error too."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from megaresid.evaluation.undisturbed import undisturbed

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        self.register_buffer("alpha", torch.tensor(0.25), persistent=False)
        self.inner[1].eval()  # a part that its owner keeps in evaluation mode


def state(model: Model) -> dict:
    return {
        "python": random.getstate(),
        "numpy": [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "modes": [part.training for part in model.modules()],
        "alpha": model.alpha.item(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


def seeds(model):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def draws(model):
    random.random(), np.random.rand(), torch.rand(3)


def modes(model):
    model.eval()
    model.inner[1].train()


def buffers(model):
    model.alpha.fill_(1.0)


def settings(model):
    torch.set_grad_enabled(False)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True


@pytest.mark.parametrize("disturb", [seeds, draws, modes, buffers, settings])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_it_was(disturb, fails):
    model = Model()
    before = state(model)
    caught = None
    try:
        with undisturbed(model, CPU):
            disturb(model)
            assert state(model) != before, "nothing was disturbed: the test would not see it"
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        caught = error
    assert fails == (caught is not None)
    after = state(model)
    assert {key for key in before if after[key] != before[key]} == set()


def test_the_generator_of_the_device_too(monkeypatch):
    """No accelerator is needed: one is played that keeps a number for each device."""
    numbers = {"cuda:0": 5, "cuda:1": 7}

    class Played:
        @staticmethod
        def get_rng_state(device):
            return numbers[str(device)]

        @staticmethod
        def set_rng_state(value, device):
            numbers[str(device)] = value

    monkeypatch.setattr(torch, "get_device_module", lambda device: Played)
    with undisturbed(Model(), torch.device("cuda:1")):
        numbers["cuda:1"] = 8
    assert numbers == {"cuda:0": 5, "cuda:1": 7}
