"""megaresid: pretraining to compare residual connections and attention at the same cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from megaresid.model.gpt import GPT

__version__ = "0.1.0"


def load(path: str | Path) -> GPT:
    """The model of an exported folder, a run directory or a checkpoint: fp32 on the CPU, in evaluation mode.

    ``model(idx)[0]`` are the logits [B, T, vocabulary] of ids [B, T], int64. Raises ``megaresid.errors.UserError`` for
    what is none of these, is damaged, or names a class of yours that cannot be imported. Nothing is unpickled,
    and no code comes from what is loaded: a class of yours is imported from PYTHONPATH, never from inside ``path``.
    """
    from pathlib import Path

    from megaresid.accelerator import choose_accelerator

    choose_accelerator()
    from megaresid.saved_run import load_model

    return load_model(Path(path))
