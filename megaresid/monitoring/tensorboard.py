"""TensorBoard's view of a run, with the optimizer step as x-axis."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUPS = {
    "train_loss": "loss/train",
    "val_loss": "loss/validation",
    "val_bits_per_byte": "loss/validation_bits_per_byte",
    "learning_rate": "optimizer/learning_rate",
    "gradient_norm": "optimizer/gradient_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "memory_bytes": "memory/peak_bytes",
    "skipped_steps": "optimizer/skipped_steps",
    "skipped_batches": "optimizer/skipped_batches",
    "tokens": "progress/tokens",
    "training_seconds": "progress/training_seconds",
}
"""Of the training's own numbers; all others are an evaluation's, but for those of diagnostics."""

DIAGNOSTICS = "diagnostics/"


class TensorBoard:
    """Writes scalars below ``folder``. After a resume, what an earlier attempt wrote past ``first_step`` is hidden."""

    def __init__(self, folder: Path, first_step: int):
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            diagnosed = name.startswith(DIAGNOSTICS)
            self._writer.add_scalar(name if diagnosed else GROUPS.get(name, f"evaluation/{name}"), value, step)
        self._writer.flush()

    def charts_by_depth(self, names: Iterable[str]) -> None:
        """A chart for each quantity with a line for each of its places, on the page of custom scalars."""
        quantities = dict.fromkeys(name.split("/")[1] for name in names if name.count("/") == 2)
        charts = {quantity: ["Multiline", [f"{DIAGNOSTICS}{re.escape(quantity)}/.*"]] for quantity in quantities}
        self._writer.add_custom_scalars({"diagnostics": charts})

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self._writer.add_histogram(name, values, step, bins=64)

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self._writer.add_image(name, np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")

    def text(self, name: str, value: str) -> None:
        self._writer.add_text(name, value)

    def close(self) -> None:
        self._writer.close()
