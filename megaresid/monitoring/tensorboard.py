"""TensorBoard's view of a run, with the optimizer step as x-axis."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

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
    "tokens": "progress/tokens",
    "training_seconds": "progress/training_seconds",
}
"""Of the training's own numbers; all others are an evaluation's."""


class TensorBoard:
    """Writes scalars below ``folder``. After a resume, what an earlier attempt wrote past ``first_step`` is hidden."""

    def __init__(self, folder: Path, first_step: int):
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else 0)

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(GROUPS.get(name, f"evaluation/{name}"), value, step)
        self._writer.flush()

    def text(self, name: str, value: str) -> None:
        self._writer.add_text(name, value)

    def close(self) -> None:
        self._writer.close()
