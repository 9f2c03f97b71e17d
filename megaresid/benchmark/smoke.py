"""A short real training of every residual variant: ``python -m megaresid.benchmark.smoke --data data/python-docs``

A smoke test and not a ranking: one seed, one learning rate for all, seconds of training. It shows that the loss of
every variant falls, without a NaN, on real text through the real engine: DeepSpeed on one rank, the project's
parameter groups, order of the data and schedule. Results are kept after every variant, and what has passed is not
trained again. Exits with 1 naming the variants that failed.
"""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import UserError, exits_with_user_errors

SCHEMA = 1
NOTE = "A smoke test, not a ranking."
SHAPE = {"model": "tiny", "layers": 4, "heads": 4, "width": 64, "context": 128}
TRAINING = {"global_batch_size": 8, "learning_rate": 3e-3, "min_learning_rate": 3e-4, "warmup_fraction": 0.1}
VALIDATION_TOKENS = 8192
ENDS = 10  # so many steps at either end, whose mean loss is compared


@dataclass(frozen=True)
class Request:
    """Train every residual variant for a short while and see its loss fall: a smoke test, not a ranking."""

    data: Path
    """Folder of shards with a manifest, made by `python -m data_prep`."""
    variants: str | None = None
    """Specs separated by semicolons, such as "rezero; attention=value_residual"; by default all."""
    steps: int = 60
    """Optimizer steps of each."""
    seed: int = 42
    """Seeds the initial weights and the order of the data."""
    out: Path = Path("runs/smoke.json")
    """Where the results are kept; what has passed there is not trained again."""
    deepspeed_config: Path = Path("ds_configs/cpu.json")
    """DeepSpeed JSON."""


@dataclass
class Training:
    """What a training showed, step by step; the validation losses are those before it and after it."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    def finite(self) -> bool:
        return all(map(math.isfinite, self.losses + self.gradient_norms + self.validation))


def judge(training: Training) -> str | None:
    """Why a variant failed: a loss or a gradient that is not finite, or a loss that did not fall. None if it passed."""
    if not training.finite():
        return f"a loss or a gradient norm was not finite at step {len(training.losses)}"
    first, last = ends(training.losses)
    if not last < first:
        return f"the training loss did not fall: {first:.4f} to {last:.4f}"
    before, after = training.validation
    if not after < before:
        return f"the validation loss did not fall: {before:.4f} to {after:.4f}"
    return None


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean of the first and of the last ENDS losses; of the two halves, where there are fewer."""
    count = max(1, min(ENDS, len(losses) // 2))
    return fmean(losses[:count]), fmean(losses[-count:])


def row_of(training: Training, tokens_per_step: int, seconds: float) -> dict[str, Any]:
    """What is kept of a training that came to its end or to a NaN. JSON has no NaN: what is not finite is null."""
    first, last = ends(training.losses)
    row = {
        "first_loss": first,
        "last_loss": last,
        "first_validation_loss": training.validation[0],
        "last_validation_loss": training.validation[-1] if len(training.validation) == 2 else math.nan,
        "largest_gradient_norm": max(training.gradient_norms, key=lambda norm: (math.isnan(norm), norm)),
    }
    row = {key: value if math.isfinite(value) else None for key, value in row.items()}
    row |= {"steps": len(training.losses), "tokens": len(training.losses) * tokens_per_step, "seconds": seconds}
    return row | {"failure": judge(training)}


class Bench:
    """What all variants are trained on: the configuration without the variant, and the data."""

    def __init__(self, request: Request):
        """Raises UserError."""
        from megaresid.config import from_flat
        from megaresid.data.manifest import check_vocabulary, load_manifest
        from megaresid.data.sampler import check_capacity
        from megaresid.data.shards import TokenStream
        from megaresid.evaluation.validation import count_windows
        from megaresid.training.ds_config import plan_batch, resolve

        if request.steps < 2:
            raise UserError(f"--steps {request.steps}: must be at least 2, a start and an end")
        values = SHAPE | TRAINING | {"steps": request.steps, "seed": request.seed}
        self.config = from_flat(values, "the smoke test")
        self.shape, self.batch = self.config.shape, plan_batch(self.config, ranks=1)
        manifest = load_manifest(request.data)
        check_vocabulary(manifest, self.shape.vocab_size)
        self.training = TokenStream.open(request.data, manifest, "train")
        self.validation = TokenStream.open(request.data, manifest, "val")
        sizes = {"context": self.shape.context, "global_batch": self.batch.sequences}
        check_capacity(len(self.training), **sizes, where=f"--data {request.data}")
        count_windows(self.validation, self.shape.context, VALIDATION_TOKENS)
        self.deepspeed_config = request.deepspeed_config
        self.setting = {
            **values,
            "validation_tokens": VALIDATION_TOKENS,
            "data": manifest.identity,
            "deepspeed": resolve(request.deepspeed_config, self.config, self.batch).engine,
        }

    @property
    def tokens_per_step(self) -> int:
        return self.batch.sequences * self.shape.context

    def train(self, entry: str) -> Training:
        """Train one variant to the end, or to the first number that is not finite. Needs the process group."""
        from megaresid.benchmark.entries import plan_of
        from megaresid.data.loader import Loader
        from megaresid.data.sampler import Sampler, windows
        from megaresid.evaluation.validation import Validation
        from megaresid.training.ds_config import resolve
        from megaresid.training.engine import Engine
        from megaresid.training.schedule import learning_rate

        config, shape, steps = self.config, self.shape, self.config.run.steps
        ds_config = resolve(self.deepspeed_config, config, self.batch)
        engine = Engine(plan_of(entry, shape), config, ds_config, self.batch)
        common = {"context": shape.context, "vocab_size": shape.vocab_size}
        validate = Validation(self.validation, tokens=VALIDATION_TOKENS, **common)
        sampler = Sampler(windows(len(self.training), shape.context), config.run.seed)
        share = common | {"micro_batch": self.batch.micro, "rank": 0, "ranks": 1}
        loader = Loader(self.training, sampler, global_batch=self.batch.sequences, last_step=steps, **share)
        found = Training()
        with loader:
            engine.set_step(0)
            found.validation.append(validate(engine)["val_loss"])
            for step in range(steps):
                engine.set_step(step + 1)
                result = engine.train_step(loader, learning_rate(step, steps, config.optimizer))
                found.losses.append(result.loss.item())
                found.gradient_norms.append(result.gradient_norm)
                if not found.finite():
                    break
            else:
                found.validation.append(validate(engine)["val_loss"])
        engine.deepspeed.destroy()
        return found


def read_results(out: Path, setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The results that ``out`` has, by variant; raises UserError where they are of another setting."""
    from megaresid.config import read_object

    if not out.exists():
        return {}
    kept = read_object(out, "--out")
    before, results = kept.get("setting"), kept.get("variants")
    if not (isinstance(before, dict) and isinstance(results, dict) and all(map(_is_row, results.values()))):
        raise UserError(f"--out {out}: it is no result of this command: name another file")
    for key in sorted(setting.keys() | before.keys()):
        if before.get(key) != setting.get(key):
            raise UserError(
                f"--out {out}: its results are of {key}={before.get(key)}, now it is {setting.get(key)}: "
                "name another file"
            )
    return results


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and "failure" in value


def run(bench: Bench, chosen: list[str], results: dict[str, dict[str, Any]], out: Path) -> dict[str, str]:
    """Train what has not passed yet, say how and keep it in ``out``; the failures by variant. Needs the process
    group."""
    from megaresid.training.run_dir import environment, write_json

    out.parent.mkdir(parents=True, exist_ok=True)
    for done, entry in enumerate(chosen, start=1):
        if entry in results and results[entry]["failure"] is None:
            print(f"{done}/{len(chosen)}  {entry}: has passed already", flush=True)
            continue
        since = time.perf_counter()
        try:
            training = bench.train(entry)
            results[entry] = row_of(training, bench.tokens_per_step, time.perf_counter() - since)
        except Exception as error:  # the others are worth training all the same
            results[entry] = {"failure": f"{type(error).__name__}: {error}".splitlines()[0]}
        gc.collect()  # the engine is in cycles
        tree = {"schema": SCHEMA, "note": NOTE, "setting": bench.setting, "environment": environment()}
        write_json(out, tree | {"variants": results})
        print(f"{done}/{len(chosen)}  {entry}: {tell(results[entry])}", flush=True)
    return {entry: results[entry]["failure"] for entry in chosen if results[entry]["failure"] is not None}


def tell(row: dict[str, Any]) -> str:
    """A result in a line."""
    if row["failure"] is not None:
        return f"FAILED: {row['failure']}"
    return (
        f"loss {row['first_loss']:.3f} to {row['last_loss']:.3f}, validation {row['first_validation_loss']:.3f} to "
        f"{row['last_validation_loss']:.3f}, gradient norm at most {row['largest_gradient_norm']:.2f}, "
        f"{row['tokens']:,} tokens in {row['seconds']:.0f} s"
    )


def main(request: Request) -> None:
    choose_accelerator()
    from megaresid.training import compiled_ops

    compiled_ops.remove_stale_locks(compiled_ops.use_environment_folder())
    import torch.distributed

    from megaresid.benchmark.entries import entries
    from megaresid.training.engine import start_process_group

    bench = Bench(request)
    chosen = entries(request.variants, bench.shape)
    results = read_results(request.out, bench.setting)
    tokens = f"{request.steps} steps of {bench.tokens_per_step:,} tokens, seed {request.seed}"
    print(f"{NOTE} {len(chosen)} variant(s), {tokens}", flush=True)
    start_process_group()
    try:
        failures = run(bench, chosen, results, request.out)
    finally:
        torch.distributed.destroy_process_group()
    print(f"{NOTE} Results: {request.out}")
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    exits_with_user_errors(lambda: main(tyro.cli(Request, prog="python -m megaresid.benchmark.smoke")))()
