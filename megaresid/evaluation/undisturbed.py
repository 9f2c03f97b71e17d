"""What an evaluation must leave as it found it, for the training after it to be the one without it, bit for bit."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore, whatever the block does and however it ends: every generator of the process (Python's, numpy's,
    PyTorch's of the CPU and of ``device``), the module's training mode and buffers (those that depend on the step are
    among them), and the process's settings of PyTorch.

    Parameters and their gradients are not looked at: to change them is training.
    """
    modes = {part: part.training for part in module.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    settings = _settings()
    with generators_kept(device):
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode
            for buffer, value in buffers:
                with torch.no_grad():
                    buffer.copy_(value)
            _set(settings)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Restore every generator of the process, as above."""
    pythons, numpys, cpus = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    devices = accelerator.get_rng_state(device) if accelerator else None
    try:
        yield
    finally:
        random.setstate(pythons)
        np.random.set_state(numpys)
        torch.set_rng_state(cpus)
        if accelerator:
            accelerator.set_rng_state(devices, device)


def _settings() -> dict:
    return {
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
    }


def _set(settings: dict) -> None:
    torch.set_grad_enabled(settings["grad"])
    if torch.get_num_threads() != settings["threads"]:
        torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(settings["dtype"])
    torch.set_float32_matmul_precision(settings["precision"])
    torch.use_deterministic_algorithms(settings["deterministic"], warn_only=settings["warn_only"])
    torch.backends.cudnn.benchmark = settings["cudnn_benchmark"]
    torch.backends.cudnn.deterministic = settings["cudnn_deterministic"]
