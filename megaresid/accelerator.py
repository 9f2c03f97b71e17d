"""Which accelerator DeepSpeed uses, decided before it is imported."""

import os


def choose_accelerator() -> None:
    """Where there is no GPU say so to DeepSpeed, which would otherwise search for one and warn at every start."""
    if "DS_ACCELERATOR" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
