"""What saving a checkpoint costs training: ``python -m megaresid.benchmark.saving``

How long the training thread is held by a save in the foreground, and by the copy that a save in the background takes,
for one rank; the first copy also gets its memory from the system.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import exits_with_user_errors


@dataclass(frozen=True)
class Request:
    """Compare saving in the foreground and in the background."""

    model: Literal["tiny", "gpt2", "gpt2-medium"] = "tiny"
    """A preset."""
    folder: Path | None = None
    """On the disk to be measured; by default the system's folder for what is temporary."""
    repeats: int = 3
    """Saves of each kind."""


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    request = tyro.cli(Request, args=arguments, prog="python -m megaresid.benchmark.saving")
    choose_accelerator()
    with tempfile.TemporaryDirectory(dir=request.folder) as folder:
        print(json.dumps(measure(request, Path(folder)), indent=2))


def measure(request: Request, folder: Path) -> dict[str, float | str]:
    """Seconds (medians but of the first copy) and the bytes of a checkpoint."""
    import torch

    from megaresid.config import from_flat
    from megaresid.training.checkpoint import save_checkpoint
    from megaresid.training.ds_config import plan_batch, resolve
    from megaresid.training.engine import Engine, start_process_group
    from megaresid.training.retention import Retention
    from megaresid.training.saver import Saver

    start_process_group()
    config = from_flat({"model": request.model, "context": 32, "global_batch_size": 1}, "benchmark")
    path, batch = folder / "ds.json", plan_batch(config, 1)
    path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}))
    engine = Engine(config.plan(), config, resolve(path, config, batch), batch)
    tokens = torch.zeros(1, 32, dtype=torch.int64)
    engine.train_step(iter([(tokens, tokens)] * batch.accumulation), 1e-3)

    state, steps = (engine.deepspeed, engine.parameters), iter(range(1, 2**20))
    foreground, held, written = [], [], []
    for _ in range(request.repeats):
        place = folder / "foreground"
        save = lambda: save_checkpoint(*state, place, step=next(steps), counters={}, identity={})  # noqa: E731
        foreground.append(_seconds(save))
    with Saver(*state, folder / "background", identity={}, retention=Retention(1)) as saver:
        for _ in range(request.repeats + 1):
            held.append(_seconds(lambda: saver.save(next(steps), {})))
            written.append(_seconds(saver.finish))
    size = sum(file.stat().st_size for file in next((folder / "background").glob("step_*")).iterdir())
    engine.deepspeed.destroy()
    return {
        "model": request.model,
        "device": str(engine.device),
        "checkpoint_bytes": size,
        "foreground_seconds": median(foreground),
        "first_copy_seconds": held[0],
        "copy_seconds": median(held[1:]),
        "written_in_background_seconds": median(written[1:]),
    }


def _seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
