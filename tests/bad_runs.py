"""Short runs, through the real command's parts, over data in which some batches are bad: on every rank of a pool."""

import gc
import hashlib
import json
import random
import struct
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from megaresid.config import from_flat
from megaresid.model.presets import PRESETS
from megaresid.training.engine import Engine
from megaresid.training.prepare import prepare
from megaresid.training.run import execute
from megaresid.training.signals import Wishes
from megaresid.training.supervisor import Report
from megaresid.training.zero_state import live_state

CONTEXT, GLOBAL_BATCH, STEPS, BATCHES, VOCABULARY = 24, 8, 32, 60, 300
ADAMW = {"type": "AdamW", "params": {"torch_adam": True, "fused": True}}
PER_BATCH = CONTEXT * GLOBAL_BATCH


def small_vocabulary():
    """While it runs, the tiny preset has few tokens."""
    return mock.patch.dict(PRESETS, tiny=PRESETS["tiny"].model_copy(update={"vocab_size": VOCABULARY}))


def batch_of(number: int, bad: bool) -> list[int]:
    """The tokens of a batch: walks over 13 ids, or any ids. The first, which is the last target of the batch before, is
    the same in all."""
    drawn = random.Random(number)
    if bad:
        return [0] + [drawn.randrange(VOCABULARY) for _ in range(PER_BATCH - 1)]
    start, stride = drawn.randrange(1, 40), drawn.randrange(1, 40)
    return [0] + [(start + stride * position + drawn.randrange(2)) % 13 for position in range(1, PER_BATCH)]


def write_data(folder: Path, bad: set[int] = frozenset(), without: range = range(0)) -> Path:
    """A data set whose sequences in order are those of batches 0, 1, ...; some are bad, and some left out."""
    ids = [token for n in range(BATCHES) if n not in without for token in batch_of(n, n in bad)] + [0]
    folder.mkdir(parents=True)
    data = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids)
    (folder / "train_000000.bin").write_bytes(data)
    shard = {"name": "train_000000.bin", "split": "train", "tokens": len(ids), "bytes": len(data)}
    shard |= {"sha256": hashlib.sha256(data).hexdigest(), "largest_id": max(ids)}
    content = {
        "source": {"kind": "text", "revision": "1"},
        "options": {"shard_tokens": len(ids), "validation_fraction": 0.0},
        "tokenizer": {"name": "gpt2", "sha256": "0" * 64, "vocab_size": VOCABULARY, "end_of_text": 299},
        "split_rule": "by hand",
        "splits": {"train": {"documents": 1, "tokens": len(ids)}},
        "dropped": {"empty": 0},
        "runs_cut": 0,
        "shards": [shard],
    }
    made = {"created": "2026-01-01T00:00:00+00:00", "inputs": [], "text_column": "text", "workers": 1, "versions": {}}
    (folder / "manifest.json").write_text(json.dumps({"schema": 1, "content": content, "provenance": made}))
    return folder


class Overflowing(Engine):
    """After its second step one matrix of layer 1 is far too large."""

    def train_step(self, *args):
        result = super().train_step(*args)
        if self.deepspeed.global_steps == 2:
            live = live_state(self.deepspeed, self.parameters)
            for fragment in live.fragments:
                if fragment.name == OVERFLOWS:
                    fragment.of(fragment.owner).fill_(3e38)
            live.publish()
        return result


OVERFLOWS = "layers.01.mlp.fc.weight"


def carry_out(run: str, data: str, stage: int, engine: type = Engine, **options) -> tuple[str, list[str]]:
    """Runs on every rank: how the run ended, and what it said."""
    run, rank = Path(run), dist.get_rank()
    run.parent.mkdir(exist_ok=True, parents=True)
    path = run.parent / f"{run.name}-rank{rank}.json"
    path.write_text(json.dumps({"optimizer": ADAMW, "zero_optimization": {"stage": stage}}))
    values = {"model": "tiny", "layers": 2, "heads": 2, "width": 32, "context": CONTEXT, "eval": "", "hang_timeout": 0}
    values |= {"data": [data], "data_order": "sequential", "run_dir": str(run), "deepspeed_config": str(path)}
    values |= {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2, "steps": STEPS, "learning_rate": 0.01}
    values |= {"log_interval": 1, "checkpoint_interval": 4, "keep_checkpoints": 0, "seed": 3, "clip": 1.0}
    values |= {"spike_window": 6, "spike_threshold": 12.0}
    config, told = from_flat(values | options, "test"), []
    with (
        small_vocabulary(),
        mock.patch("megaresid.training.run.start_process_group"),
        mock.patch("torch.distributed.destroy_process_group"),
        mock.patch("megaresid.training.run.Engine", engine),
        mock.patch("megaresid.monitoring.metrics.Recorder.say", lambda _, line: told.append(line)),
    ):
        outcome = execute(prepare(config), Wishes(), Report())
    gc.collect()  # the run directory's lock
    return outcome.name, told
