"""What a run came to, in a few lines: ``python -m megaresid.summary --run runs/first``"""

import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from megaresid.data.manifest import load_manifest
from megaresid.data.mixture import proportional
from megaresid.data.sampler import windows
from megaresid.data.shards import TokenStream
from megaresid.errors import UserError, exits_with_user_errors
from megaresid.training.run_dir import read_json, read_metrics

COUNTED_TOKENS = 100_000_000
PIECE = 1 << 20
SECONDS = "seconds/"


def unigram_loss(
    training: Sequence[TokenStream],
    validation: Sequence[TokenStream],
    tokens: Sequence[int],
    shares: Sequence[Fraction],
    vocab_size: int,
) -> float:
    """Nats per token of the best model that ignores context, of data in one folder or several.

    It has add-one frequencies of the training tokens (the first 100 million of a folder at most), the folders counting
    by their shares, and is judged on validation tokens 1 to ``tokens`` of each, the targets of the validation loss.
    """
    lengths = [min(len(stream), COUNTED_TOKENS) for stream in training]
    counted = float(sum(share * length for share, length in zip(shares, lengths, strict=True)))
    seen = sum(
        _counts(stream, 0, length, vocab_size) * (float(share) * counted / length)
        for stream, length, share in zip(training, lengths, shares, strict=True)
    )
    log_probability = np.log((seen + 1) / (seen.sum() + vocab_size))
    wanted = sum(_counts(stream, 1, count, vocab_size) for stream, count in zip(validation, tokens, strict=True))
    return float(-(wanted * log_probability).sum() / wanted.sum())


def _counts(stream: TokenStream, start: int, tokens: int, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for at in range(start, start + tokens, PIECE):
        piece = stream.read(at, min(PIECE, start + tokens - at))
        counts += np.bincount(piece, minlength=vocab_size)
    return counts


def summarise(run: Path) -> str:
    """The summary of a run. Raises UserError where there is no run, no evaluation yet, or no longer its data.

    Args:
        run: A run directory.
    """
    try:
        return _summarise(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{run}: its files are not as a run writes them ({what}): put back what was changed") from error


def _summarise(run: Path) -> str:
    config, shape = read_json(run, "config.json"), read_json(run, "spec.json")["shape"]
    # A run that has only just begun has no metrics.jsonl yet.
    rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    lines = [*validation_lines(run, rows, config, shape), *evaluation_lines(rows)]
    if not lines:
        raise UserError(f"{run}: no evaluation has been recorded: train with --eval, such as validation@100")
    if speeds := [row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None]:
        lines.append(f"speed             {statistics.median(speeds):,.0f} tokens per second (median, training alone)")
    tensorboard = _from_here(Path(sys.executable).parent / "tensorboard")
    lines += [
        f"run directory     {run}",
        f"TensorBoard       {shlex.join([str(tensorboard), '--logdir', str(run / 'tensorboard')])}",
    ]
    return "\n".join(lines)


def validation_lines(run: Path, rows: list[dict], config: dict[str, Any], shape: dict[str, Any]) -> list[str]:
    """The first and the last validation loss, and that of a model without context; nothing without a validation."""
    validations = [row for row in rows if "val_loss" in row]
    if not validations:
        return []
    folders = _folders(run)
    context, most = shape["context"], config["validation_tokens"]
    training, validation, shares = zip(*folders)
    available = [windows(len(stream), context) for stream in validation]
    tokens = [count * context for count in proportional(shares, available, most // context)]
    unigram = unigram_loss(training, validation, tokens, shares, shape["vocab_size"])
    first, last = validations[0], validations[-1]
    return [
        f"validation loss   {_loss(first)} at step {first['step']}, {_loss(last)} at step {last['step']} after "
        f"{last['tokens']:,} tokens",
        f"unigram loss      {unigram:.3f} on the same tokens{_relative(last['val_loss'], unigram)}",
    ]


def evaluation_lines(rows: list[dict]) -> list[str]:
    """The last value of each other number that evaluations gave, the last failure of each that failed since it last
    gave any, and the seconds that all took."""
    last: dict[str, dict] = {}
    seconds: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for row in rows:
        failed |= row.get("failed", {})
        # What an evaluation gave stands with its seconds in one row.
        for hook in [name.removeprefix(SECONDS) for name in row if name.startswith(SECONDS)]:
            seconds[hook] += row[SECONDS + hook]
            failed.pop(hook, None)
            last |= {name: row for name in row if name not in ("schema", "step", "tokens", "val_loss", SECONDS + hook)}
    lines = []
    for name, row in last.items():
        error = row.get(f"{name}_stderr")
        if not name.endswith("_stderr"):
            value = "not finite" if row[name] is None else f"{row[name]:.4g}"
            lines.append(f"{name:17} {value}{'' if error is None else f' +- {error:.2g}'} at step {row['step']}")
    lines += [f"failed            {failure}" for failure in failed.values()]
    if seconds:
        each = ", ".join(f"{name} {spent:,.1f} s" for name, spent in seconds.items())
        lines.append(f"evaluation took   {each}")
    return lines


def _folders(run: Path) -> list[tuple[TokenStream, TokenStream, Fraction]]:
    """The training and validation tokens that the run was trained on, and the share of each folder."""
    data = read_json(run, "data.json")
    found = []
    # Runs from before several folders were blended name theirs in the tree itself.
    for entry in data.get("folders", [data]):
        folder = Path(entry["folder"])
        if not folder.is_dir():
            raise UserError(
                f"{run / 'data.json'}: data folder {folder} is gone: put it back, or name its new place there"
            )
        manifest = load_manifest(folder)
        if manifest.identity != entry["identity"]:
            raise UserError(
                f"data folder {folder} holds other data now than {run} was trained on: put the old data back"
            )
        streams = (TokenStream.open(folder, manifest, split) for split in ("train", "val"))
        found.append((*streams, Fraction(entry.get("share", 1))))
    return found


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
