"""A DeepSpeed JSON, held against what training takes; DeepSpeed is imported in a process of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaresid.checks.child import ChildFailed, give, start_module
from megaresid.checks.finding import Finding, fault, ok
from megaresid.config import RunConfig, from_flat, read_object
from megaresid.errors import UserError

SECONDS = 90.0
OPTIONS = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas"}


def deepspeed_json(path: Path) -> Iterator[Finding]:
    try:
        answer = start_module("megaresid.checks.deepspeed_json", str(path), seconds=SECONDS).answer()
    except ChildFailed as error:
        yield fault("DeepSpeed JSON", f"{path} cannot be read by DeepSpeed ({error})", "mend that first")
        return
    if "error" in answer:
        yield fault("DeepSpeed JSON", answer["error"], "")
    else:
        yield ok("DeepSpeed JSON", f"{path}: ZeRO {answer['stage']}, {answer['optimizer']}, {answer['products']}")


def options_of(tree: dict[str, Any], path: Path) -> RunConfig:
    """The options that agree with what the JSON fixes: with others a run says so."""
    optimizer = tree.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    given = {OPTIONS[key]: value for key, value in params.items() if key in OPTIONS} if isinstance(params, dict) else {}
    given |= {"clip": tree["gradient_clipping"]} if "gradient_clipping" in tree else {}
    given |= {"global_batch_size": tree["train_batch_size"]} if "train_batch_size" in tree else {}
    micro = tree.get("train_micro_batch_size_per_gpu")
    given |= {"micro_batch_size": micro} if micro is not None else {}
    given = {key: value for key, value in given.items() if value != "auto"}
    return from_flat({"global_batch_size": given.get("micro_batch_size", 1)} | given, str(path))


def main() -> None:
    from megaresid.accelerator import choose_accelerator

    path = Path(sys.argv[1])
    choose_accelerator()
    from megaresid.training.ds_config import plan_batch, resolve

    try:
        config = options_of(read_object(path, "--deepspeed-config"), path)
        found = resolve(path, config, plan_batch(config, 1))
    except UserError as error:
        give({"error": str(error)})
        return
    products = str(found.product_dtype).removeprefix("torch.")
    give({"stage": found.stage, "optimizer": found.engine["optimizer"]["type"], "products": f"products in {products}"})


if __name__ == "__main__":
    main()
