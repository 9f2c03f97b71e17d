"""In what runs differ, and whether they may be ranked all the same."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megaresid.compare.results import Differing
from megaresid.compare.runs import INITIAL, Run, number, plain

RECIPE = (
    *("global_batch_size", "schedule", "warmup_fraction", "decay_fraction", "weight_decay", "betas", "clip"),
    *("parameter_rules", "init_from"),
)
"""Options that train another model of the same variant: what differs in them is not the variant's doing."""
RECIPE_OF_DEEPSPEED = ("optimizer.", "torch_autocast.", "bf16.", "fp16.", "data_types.")
ELSEWHERE = (
    *("schema", "data", "data_weights", "data_order", "align_documents", "run_dir", "deepspeed_config", "resume"),
    *("allow_other", "dry_run", "steps", "validation_tokens", "validation_interval", "min_learning_rate", "eval_data"),
    *("log_interval", "checkpoint_interval", "keep_checkpoints", "keep_every", "hang_timeout", "eval_strict"),
    "diagnose_interval",
)
"""Options that stand in another form below, or change no number."""
OF_DEEPSPEED_ELSEWHERE = (
    *("schema", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "optimizer.params.lr", "optimizer.params.betas", "optimizer.params.weight_decay"),
    *("optimizer.params.fused", "optimizer.params.torch_adam", "steps_per_print"),
)
ENVIRONMENT = (
    *("versions", "python", "platform", "processor", "cores", "devices", "cuda", "ranks", "threads_per_rank"),
    "kernels",
)
TIMING = (
    *("environment.processor", "environment.cores", "environment.devices", "environment.cuda", "environment.ranks"),
    *("environment.threads_per_rank", "compile", "activation_checkpointing", "micro_batch_size", "pipeline_stages"),
)
"""What the speed of a run depends on beside its model."""
SAME_FLOPS, SAME_SECONDS = 1.02, 1.1
"""How far apart totals may be that are meant to be equal: a step more or less; a clock that others share."""

DATA, VALIDATION, TOKENS, CHANGED = "data", "validation set", "tokens", "changed on the way"
UNKNOWN = "not recorded"


def differences(runs: Sequence[Run], flops_per_token: Mapping[str, int]) -> tuple[list[Differing], str | None]:
    """Every key in which ended runs differ, with its values, and, where their tokens differ but not what they spent,
    what that was: "FLOPs" or "training time". ``flops_per_token`` is by the hash of the layer specs."""
    values = {run.name: dict(_facts(run)) for run in runs}
    spent = _equal_instead(runs, flops_per_token)
    found = []
    for key in dict.fromkeys(key for facts in values.values() for key in facts):
        by_value: dict[str, list[str]] = defaultdict(list)
        for name, facts in values.items():
            by_value[facts[key][0] if key in facts else UNKNOWN].append(name)
        if len(by_value) > 1:
            # What an earlier version did not record is no difference.
            known = sum(value != UNKNOWN for value in by_value)
            comparable = known < 2 or all(facts[key][1] for facts in values.values() if key in facts)
            if key == TOKENS and spent:
                comparable = True
            sorted_values = sorted((value, tuple(sorted(names))) for value, names in by_value.items())
            found.append(Differing(key=plain(key), values=tuple(sorted_values), comparable=comparable))
    return sorted([*found, *_unequal_orders(runs)], key=lambda one: one.comparable), spent


def _unequal_orders(runs: Sequence[Run]) -> Iterable[Differing]:
    """Seeds whose runs did not see the same sequences in the same order, as runs that are paired must."""
    orders: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if (order := run.files.get(INITIAL, {}).get("order")) is not None:
            digest = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()
            orders[run.seed][_short(digest)].append(run.name)
    for seed, by_order in sorted(orders.items()):
        if len(by_order) > 1:
            values = tuple(sorted((order, tuple(sorted(names))) for order, names in by_order.items()))
            yield Differing(key=f"order of the data at seed {seed}", values=values, comparable=False)


def _facts(run: Run) -> Iterable[tuple[str, tuple[str, bool]]]:
    """Each key with its value, and whether runs of another value may be ranked with it."""
    data = run.files["data.json"]
    yield DATA, (_short(data.get("identity")), False)
    yield VALIDATION, (_validation_set(run), False)
    yield TOKENS, (f"{run.steps * run.tokens_per_step:,}", False)
    yield "vocabulary", (_text(run.files["spec.json"]["shape"].get("vocab_size")), False)
    yield CHANGED, (_text(data.get("changes", "nothing")), False)
    yield "layer specs", (run.spec.hash[:12], True)
    ratio = number(run.config, "min_learning_rate")
    if ratio is not None and run.learning_rate > 0:
        yield "min_learning_rate / learning_rate", (f"{ratio / run.learning_rate:.4g}", True)
    for key, value in run.config.items():
        if key not in ELSEWHERE:
            yield key, (_text(value), key not in RECIPE)
    for key, value in _flat(run.files["ds_config.json"]):
        if key not in OF_DEEPSPEED_ELSEWHERE:
            yield f"deepspeed.{key}", (_text(value), not key.startswith(RECIPE_OF_DEEPSPEED))
    environment = run.files["environment.json"]
    for key, value in _flat({key: environment[key] for key in ENVIRONMENT if key in environment}):
        yield f"environment.{key}", (_text(value), True)


def _validation_set(run: Run) -> str:
    """The windows that are measured: the first of the split, as many as were asked for or as there are."""
    context, data = run.spec.shape.context, run.files["data.json"]
    asked, there = number(run.config, "validation_tokens"), number(data, "validation_tokens")
    windows = [asked // context] if asked is not None else []
    windows += [max(there - 1, 0) // context] if there is not None else []
    return f"{min(windows, default=0):,.0f} windows of {context:,} tokens of {_short(data.get('identity'))}"


def _equal_instead(runs: Sequence[Run], flops_per_token: Mapping[str, int]) -> str | None:
    """What runs of unequal tokens have spent equally."""
    tokens = [run.steps * run.tokens_per_step for run in runs]
    flops = [spent * flops_per_token[run.spec.hash] for spent, run in zip(tokens, runs)]
    seconds = [run.final.seconds for run in runs]
    apart = _apart(tokens)
    if apart == 1:
        return None
    if _apart(flops) <= min(SAME_FLOPS, apart):
        return "FLOPs"
    return "training time" if _apart(seconds) <= min(SAME_SECONDS, apart) else None


def _apart(totals: Sequence[float]) -> float:
    return max(totals, default=1) / max(min(totals, default=1), 1e-300)


def _flat(tree: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _text(value: Any) -> str:
    return plain(value) if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> str:
    text = _text(value)
    return text[:12] if len(text) == 64 else text
