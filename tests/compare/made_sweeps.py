"""Run directories as a training leaves them, written by hand: only their numbers are invented.

    write_run(folder / "a", residual="vanilla", seed=1, loss=3.2)
    write_sweep(folder, {"vanilla": [3.20, 3.21, 3.19], "attention_residual": [3.15, 3.17, 3.16]})
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STEPS, EVERY, BATCH, CONTEXT = 100, 10, 4, 16
TOKENS_A_STEP = BATCH * CONTEXT
START = 10.8
"""The loss before the first step."""


def config_of(residual: str, attention: str, seed: int, learning_rate: float, steps: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "data": ["data/some"],
        "data_order": "shuffled",
        "run_dir": "runs/some",
        "deepspeed_config": "ds_configs/cpu.json",
        "steps": steps,
        "seed": seed,
        "init_from": None,
        "model": "tiny",
        "attention": attention,
        "positions": "auto",
        "separate_documents": False,
        "residual": residual,
        "layers": 2,
        "heads": 2,
        "width": 32,
        "context": CONTEXT,
        "dropout": 0.0,
        "activation": "gelu_tanh",
        "global_batch_size": BATCH,
        "micro_batch_size": 2,
        "learning_rate": learning_rate,
        "min_learning_rate": learning_rate / 10,
        "schedule": "cosine",
        "warmup_fraction": 0.02,
        "decay_fraction": 0.2,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "clip": 1.0,
        "parameter_rules": [],
        "compile": False,
        "log_interval": 10,
        "on_spike": "skip",
        "max_bad_steps": 10,
        "eval": f"validation@{EVERY}",
        "validation_tokens": 1024,
    }


def spec_of(config: Mapping[str, Any]) -> dict[str, Any]:
    layer = {"attention": {"name": config["attention"]}, "residual": {"name": config["residual"]}}
    shape = {key: config[key] for key in ("layers", "heads", "width", "context", "dropout", "activation")}
    tree = {
        "schema": 1,
        "shape": shape | {"vocab_size": 50257, "end_of_text": 50256},
        "positions": True,
        "documents": config["separate_documents"],
        "layers": [layer] * config["layers"],
    }
    return tree | {"hash": hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()}


def environment_of() -> dict[str, Any]:
    return {
        "schema": 1,
        "started": "2026-01-02T03:04:05+0000",
        "command": ["--some"],
        "python": "3.11.7",
        "platform": "Linux-x86_64",
        "processor": "A processor",
        "cores": 2,
        "devices": [],
        "cuda": None,
        "ranks": 1,
        "threads_per_rank": 1,
        "versions": {"megaresid": "0.1.0", "torch": "2.13.0", "triton": None},
        "kernels": {"form": "plain PyTorch"},
    }


def data_of() -> dict[str, Any]:
    return {
        "schema": 1,
        "identity": "5" * 64,
        "order": "shuffled",
        "align_documents": False,
        "training_tokens": 100_000,
        "validation_tokens": 5_000,
        "folders": [{"folder": "/data/some", "identity": "5" * 64, "share": "1"}],
    }


def curve(loss: float, part: float, start: float = START) -> float:
    """The validation loss after ``part`` of the steps: from ``start`` to ``loss``, ever more slowly."""
    return loss + (start - loss) * (1 - part) ** 4 if part < 1 else loss


def write_run(
    folder: Path,
    *,
    residual: str = "vanilla",
    attention: str = "softmax",
    seed: int = 1,
    learning_rate: float = 1e-3,
    loss: float | None = 3.0,
    metrics: Mapping[str, float] | None = None,
    steps: int = STEPS,
    every: int = EVERY,
    until: int | None = None,
    diverged_at: int | None = None,
    parameters: int | None = 1_000_000,
    flops_per_token: int | None = 6_000_000,
    tokens_per_second: float = 1000.0,
    mfu: float | None = None,
    memory_bytes: int = 900_000_000,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    deepspeed: Mapping[str, Any] | None = None,
) -> Path:
    """A run of ``steps`` that ended with the validation loss ``loss``, or was cut short after ``until``, or whose
    losses are not finite from ``diverged_at`` on. ``metrics`` are measured at its last step; ``config``,
    ``environment``, ``data`` and ``deepspeed`` change or add keys. Without ``parameters`` and ``flops_per_token`` it is
    of an earlier version, which did not record them."""
    folder.mkdir(parents=True)
    written = config_of(residual, attention, seed, learning_rate, steps) | dict(config or {})
    spec = spec_of(written)
    if parameters is not None:
        spec |= {"parameters": parameters, "flops_per_token": flops_per_token}
    engine = {"schema": 1, "optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 1}} | dict(deepspeed or {})
    files = {
        "config.json": written,
        "spec.json": spec,
        "ds_config.json": engine,
        "environment.json": environment_of() | dict(environment or {}),
        "data.json": data_of() | dict(data or {}),
    }
    for name, tree in files.items():
        (folder / name).write_text(json.dumps(tree, indent=2) + "\n")
    tokens_a_step = written["global_batch_size"] * written["context"]
    rows: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "val_loss": START}]
    due = sorted({*range(every, steps + 1, every), steps})
    for step in (step for step in due if until is None or step <= until):
        tokens, bad = step * tokens_a_step, diverged_at is not None and step >= diverged_at
        value = None if bad else curve(loss, step / steps)
        # Now and then something else wants the machine: a median does not see it.
        speed = tokens_per_second / 7 if step == due[0] else tokens_per_second
        rows.append(
            {
                "step": step,
                "train_loss": None if bad else value + 0.01,
                "learning_rate": learning_rate,
                "gradient_norm": None if bad else 1.0,
                "tokens_per_second": speed,
                "mfu": mfu,
                "memory_bytes": memory_bytes,
                "skipped_steps": 0,
                "skipped_batches": 0,
                "tokens": tokens,
                "training_seconds": tokens / tokens_per_second,
            }
        )
        measured = dict(metrics or {}) if step == steps else {}
        rows.append({"step": step, "tokens": tokens, "val_loss": value, "seconds/validation": 0.5, **measured})
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"schema": 1} | row) + "\n" for row in rows))
    (folder / "checkpoints").mkdir()
    return folder


def run_name(residual: str, learning_rate: float, seed: int) -> str:
    return f"{residual}-{learning_rate:g}-{seed}".replace(" ", "")


def write_sweep(
    folder: Path,
    losses: Mapping[str, Sequence[float | None] | Mapping[float, Sequence[float | None]]],
    listed: bool = True,
    **of_run: Any,
) -> Path:
    """A sweep of residual variants: the final loss of each seed (1, 2, ...), of a variant at the learning rate 1e-3 or
    by learning rate; None for one that diverged. ``listed`` writes its sweep.json; ``of_run`` goes to every run, and
    what is a dictionary by residual there (``flops_per_token={"vanilla": 6_000_000, ...}``) to that residual's."""
    runs = []
    for residual, by_rate in losses.items():
        for rate, of_seeds in (by_rate if isinstance(by_rate, Mapping) else {1e-3: by_rate}).items():
            for seed, loss in enumerate(of_seeds, start=1):
                options = {
                    key: value[residual] if isinstance(value, Mapping) and residual in value else value
                    for key, value in of_run.items()
                }
                name = run_name(residual, rate, seed)
                bad = {"diverged_at": STEPS // 2} if loss is None else {}
                path = write_run(
                    folder / "runs" / name,
                    residual=residual,
                    seed=seed,
                    learning_rate=rate,
                    loss=START if loss is None else loss,
                    **bad,
                    **options,
                )
                config = json.loads((path / "config.json").read_text())
                runs.append({"name": name, "config": config, "steps": config["steps"]})
    if listed:
        tree = {"schema": 1, "axes": {"residual": list(losses)}, "runs": runs}
        (folder / "sweep.json").write_text(json.dumps(tree, indent=2) + "\n")
    return folder
