"""What data sets of ids that were found, not tokenized here, have in common: splits from names, and the manifest."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from platform import python_version

import numpy as np

import megaresid
from data_prep import tokenizer
from megaresid.data.manifest import Content, Counts, Manifest, Options, Provenance, ShardEntry, Split
from megaresid.errors import UserError


def split_in_name(path: Path) -> Split:
    """The split whose name, train or val, is a word in the file's: fineweb_val_000000.bin is of val.

    Raises UserError where neither is, or both are.
    """
    found = {"train", "val"} & set(re.split("[^a-z]+", path.name.lower()))
    if len(found) != 1:
        says = "both train and val" if found else "neither train nor val"
        raise UserError(
            f"{path}: its name has {says} in it, which is to tell the split; rename it, e.g. NAME_train_000001.bin"
        )
    return found.pop()


def ids_manifest(
    *,
    kind: str,
    revision: str,
    split_rule: str,
    splits: Mapping[Split, Counts],
    shards: list[ShardEntry],
    inputs: tuple[str, ...],
    shard_tokens: int | None = None,
) -> Manifest:
    """The manifest of a data set whose ids were found; ``revision`` is the hexadecimal sha256 over them, in order."""
    return Manifest(
        schema=1,
        content=Content(
            source={"kind": kind, "revision": f"sha256:{revision}"},
            options=Options(shard_tokens=shard_tokens),
            tokenizer={
                "name": tokenizer.NAME,
                "sha256": tokenizer.RANKS_SHA256,
                "vocab_size": tokenizer.VOCAB_SIZE,
                "end_of_text": tokenizer.END_OF_TEXT,
            },
            split_rule=split_rule,
            splits=splits,
            dropped={"empty": 0},
            runs_cut=0,
            shards=shards,
        ),
        provenance=Provenance(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            inputs=inputs,
            versions={
                "megaresid": megaresid.__version__,
                "python": python_version(),
                "numpy": np.__version__,
            },
        ),
    )
