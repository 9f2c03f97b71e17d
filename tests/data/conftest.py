"""A data set written by the definition of its format, without the code under test."""

import hashlib
import json
import struct

import pytest


@pytest.fixture
def write_data_set():
    def write(folder, shards: dict[str, list[int]]):
        """``shards``: ids by file name, whose first part is the split. Returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        entries, tokens = [], {}
        for name, ids in shards.items():
            data = struct.pack("<256i", 20240520, 1, len(ids), *[0] * 253) + struct.pack(f"<{len(ids)}H", *ids)
            (folder / name).write_bytes(data)
            split = name.split("_")[0]
            tokens[split] = tokens.get(split, 0) + len(ids)
            checksum = hashlib.sha256(data).hexdigest()
            entries.append(
                {
                    "name": name,
                    "split": split,
                    "tokens": len(ids),
                    "bytes": 1024 + 2 * len(ids),
                    "sha256": checksum,
                    "largest_id": max(ids),
                }
            )
        manifest = {
            "schema": 1,
            "content": {
                "source": {"kind": "text", "revision": "1"},
                "options": {"shard_tokens": 100, "validation_fraction": 0.5},
                "tokenizer": {"name": "gpt2", "sha256": "0" * 64, "vocab_size": 50257, "end_of_text": 50256},
                "split_rule": "by hand",
                "splits": {split: {"documents": 1, "tokens": count} for split, count in tokens.items()},
                "dropped": {"empty": 0},
                "runs_cut": 0,
                "shards": entries,
            },
            "provenance": {
                "created": "2026-01-01T00:00:00+00:00",
                "inputs": [],
                "text_column": "text",
                "workers": 1,
                "versions": {},
            },
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return write
