"""Runs by the command's own ``prepare`` and ``execute`` in the ranks' processes, which outlive them."""

import json
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from data_prep.__main__ import main as data_prep
from megaresid.config import from_flat
from megaresid.training.prepare import prepare
from megaresid.training.run import execute
from megaresid.training.signals import Wishes
from megaresid.training.supervisor import Report

MODEL = {"model": "tiny", "layers": 2, "heads": 2, "width": 32, "context": 32}
BATCH = {"global_batch_size": 8, "micro_batch_size": 2}
OFTEN = {"log_interval": 1, "keep_checkpoints": 0, "eval": ""}


def make_data(folder: Path) -> Path:
    """Shards of small texts."""
    texts = (f"Line {n} of a text about the number {n * n}, and of others. " * 9 for n in range(80))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = ["--source", "jsonl", "--input", str(folder / "text.jsonl"), "--validation-fraction", "0.2"]
    data_prep([*options, "--out", str(folder / "data")])
    return folder / "data"


def whole_run(options: dict, tree: dict) -> str:
    """Runs on every rank: how the run with these options over the ones above ended, under a DeepSpeed JSON given as a
    tree. The process group stays."""
    path = Path(options["run_dir"]).with_name(f"ds_{Path(options['run_dir']).name}_{dist.get_rank()}.json")
    path.write_text(json.dumps(tree))
    config = from_flat(MODEL | BATCH | OFTEN | options | {"deepspeed_config": path}, "test")
    with mock.patch("megaresid.training.run.start_process_group"), mock.patch.object(dist, "destroy_process_group"):
        outcome = execute(prepare(config), Wishes(), Report())
    dist.barrier()
    return outcome.value
