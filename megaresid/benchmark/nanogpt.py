"""nanoGPT's training step on our data: its model and its optimizer, imported from a checkout and never copied.

``python -m megaresid.benchmark.nanogpt --peer CHECKOUT --data DIR --steps N --out FILE``; it is run beside ours by
``megaresid.benchmark.training``. The step is that of nanoGPT's train.py without what fp32 on a CPU does not use: a
random batch, forward, backward, clipping, update, the loss read at each step. Its torch.compile is off: on a CPU it
was measured to change nothing.
"""

import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import tyro

from megaresid.errors import UserError, exits_with_user_errors


def import_model(checkout: Path) -> ModuleType:
    """The checkout's ``model.py``; raises UserError where there is none that defines a GPT."""
    path = checkout / "model.py"
    if not path.is_file():
        raise UserError(f"--peer {checkout}: it has no model.py; name a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not (hasattr(module, "GPT") and hasattr(module, "GPTConfig")):
        raise UserError(f"--peer {checkout}: its model.py defines no GPT and GPTConfig; name a checkout of nanoGPT")
    return module


def train(
    peer: Path, data: Path, steps: int, out: Path, sequences: int = 8, model: str = "tiny", threads: int = 1
) -> None:
    """Train a preset's shape, and write one JSON row a step with step, train_loss and tokens_per_second.

    Args:
        peer: Checkout of nanoGPT.
        data: Folder of shards with a manifest.
        steps: Optimizer steps.
        out: The rows; a new file.
        sequences: Sequences per step.
        model: Name of the preset.
        threads: Of PyTorch's operators.
    """
    module = import_model(peer)
    import torch

    from megaresid.data.manifest import load_manifest
    from megaresid.data.shards import TokenStream
    from megaresid.model.presets import PRESETS

    torch.set_num_threads(threads)
    shape = PRESETS[model]
    stream = TokenStream.open(data, load_manifest(data), "train")
    gpt = module.GPT(
        module.GPTConfig(
            block_size=shape.context,
            vocab_size=shape.padded_vocab_size,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_embd=shape.width,
            dropout=shape.dropout,
            bias=True,
        )
    )
    optimizer = gpt.configure_optimizers(0.1, 3e-4, (0.9, 0.95), "cpu")
    with open(out, "x", buffering=1, encoding="utf-8") as rows:
        since = time.perf_counter()
        for step in range(1, steps + 1):
            starts = torch.randint(len(stream) - shape.context, (sequences,)).tolist()
            windows = torch.stack([torch.from_numpy(stream.read(s, shape.context + 1).astype("int64")) for s in starts])
            _, loss = gpt(windows[:, :-1], windows[:, 1:].contiguous())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step, "train_loss": loss.item()}
            now = time.perf_counter()
            row["tokens_per_second"] = sequences * shape.context / (now - since)
            since = now
            rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    exits_with_user_errors(lambda: tyro.cli(train, prog="python -m megaresid.benchmark.nanogpt"))()
