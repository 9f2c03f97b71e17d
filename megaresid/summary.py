"""What a run came to, in a few lines: ``python -m megaresid.summary --run runs/first``"""

import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from megaresid.data.manifest import load_manifest
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError, exits_with_user_errors
from megaresid.evaluation.validation import count_windows
from megaresid.training.run_dir import read_json, read_metrics

COUNTED_TOKENS = 100_000_000
PIECE = 1 << 20


def unigram_loss(training: TokenStream, validation: TokenStream, tokens: int, vocab_size: int) -> float:
    """Nats per token of the best model that ignores context: add-one frequencies of the training tokens (the first
    100 million at most), on validation tokens 1 to ``tokens``, which are the targets of the validation loss."""
    seen = _counts(training, 0, min(len(training), COUNTED_TOKENS), vocab_size)
    log_probability = np.log((seen + 1) / (seen.sum() + vocab_size))
    wanted = _counts(validation, 1, tokens, vocab_size)
    return float(-(wanted * log_probability).sum() / wanted.sum())


def _counts(stream: TokenStream, start: int, tokens: int, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for at in range(start, start + tokens, PIECE):
        piece = stream.read(at, min(PIECE, start + tokens - at))
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def summarise(run: Path) -> str:
    """The summary of a run. Raises UserError where there is no run, no validation yet, or no longer its data.

    Args:
        run: A run directory.
    """
    config, shape = read_json(run, "config.json"), read_json(run, "spec.json")["shape"]
    # A run that has only just begun has no metrics.jsonl yet.
    rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    validations = [row for row in rows if "val_loss" in row]
    if not validations:
        raise UserError(f"{run}: no validation has been recorded: train with --validation-interval above 0")
    training, validation = _streams(run)
    tokens = count_windows(validation, shape["context"], config["validation_tokens"]) * shape["context"]
    unigram = unigram_loss(training, validation, tokens, shape["vocab_size"])
    first, last = validations[0], validations[-1]
    lines = [
        f"validation loss   {_loss(first)} at step {first['step']}, {_loss(last)} at step {last['step']} after "
        f"{last['tokens']:,} tokens",
        f"unigram loss      {unigram:.3f} on the same tokens{_relative(last['val_loss'], unigram)}",
    ]
    if speeds := [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]:
        lines.append(f"speed             {statistics.median(speeds):,.0f} tokens per second (median, training alone)")
    tensorboard = _from_here(Path(sys.executable).parent / "tensorboard")
    lines += [
        f"run directory     {run}",
        f"TensorBoard       {shlex.join([str(tensorboard), '--logdir', str(run / 'tensorboard')])}",
    ]
    return "\n".join(lines)


def _streams(run: Path) -> tuple[TokenStream, TokenStream]:
    """The training and validation tokens that the run was trained on."""
    data = read_json(run, "data.json")
    folder = Path(data["folder"])
    if not folder.is_dir():
        raise UserError(f"{run / 'data.json'}: data folder {folder} is gone: put it back, or name its new place there")
    manifest = load_manifest(folder)
    if manifest.identity != data["identity"]:
        raise UserError(f"data folder {folder} holds other data now than {run} was trained on: put the old data back")
    return TokenStream.open(folder, manifest, "train"), TokenStream.open(folder, manifest, "val")


def _from_here(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _loss(row: dict[str, Any]) -> str:
    """A loss that was not finite is stored as null."""
    return "not finite" if row["val_loss"] is None else f"{row['val_loss']:.3f}"


def _relative(loss: float | None, unigram: float) -> str:
    if loss is None:
        return ""
    return f": the run ends {abs(loss - unigram):.3f} {'below' if loss < unigram else 'above'} it"


@exits_with_user_errors
def main() -> None:
    print(tyro.cli(summarise, prog="python -m megaresid.summary"))


if __name__ == "__main__":
    main()
