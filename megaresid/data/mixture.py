"""The data of a run: one folder of shards, or several that are blended by weight."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megaresid.data.aligned import AlignedStream
from megaresid.data.blend import BlendedSampler, shares
from megaresid.data.manifest import Manifest, check_vocabulary, load_manifest
from megaresid.data.sampler import Order, Sampler, check_capacity, windows
from megaresid.data.shards import TOKEN, TokenStream
from megaresid.errors import UserError

Stream = TokenStream | AlignedStream


class Mixture:
    """The first windows of several streams under one numbering: all of the first stream, then all of the second, ...

    It is as long as one stream with so many windows would be.
    """

    def __init__(self, streams: Sequence[Stream], windows: Sequence[int], context: int):
        self.streams, self.context = streams, context
        self.starts = [0, *accumulate(windows)]

    def __len__(self) -> int:
        return self.starts[-1] * self.context + 1

    def read_windows(self, windows: np.ndarray, context: int) -> np.ndarray:
        """uint16[len(windows), context + 1]: the inputs and the token behind them."""
        tokens = np.empty((len(windows), context + 1), dtype=TOKEN)
        streams = self._stream_of(windows)
        for stream in np.unique(streams).tolist():
            here = streams == stream
            tokens[here] = self.streams[stream].read_windows(windows[here] - self.starts[stream], context)
        return tokens

    def place(self, window: int, column: int, context: int) -> tuple[Path, int]:
        """(shard, token offset within it) of a token of a window."""
        stream = int(self._stream_of(np.array([window]))[0])
        return self.streams[stream].place(window - self.starts[stream], column, context)

    def _stream_of(self, windows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, windows, side="right") - 1


@dataclass(frozen=True)
class Folder:
    """A data folder with the share of the run's sequences that come from it."""

    path: Path
    manifest: Manifest
    share: Fraction
    training: TokenStream
    validation: TokenStream | None  # None where the run never validates


@dataclass(frozen=True)
class RunData:
    """What a run reads: its folders, and the order and the beginnings of its training windows.

    Validation is the same in either order and whether windows are aligned or not: plain windows from the front.
    """

    folders: tuple[Folder, ...]
    order: Order
    align_documents: bool

    @property
    def training_tokens(self) -> int:
        return sum(len(folder.training) for folder in self.folders)

    @property
    def validation_tokens(self) -> int:
        return sum(len(folder.validation) for folder in self.folders if folder.validation is not None)

    @property
    def identity(self) -> str:
        """sha256 of all that decides which sequence is which; of one folder, shuffled and plain, its own identity."""
        if len(self.folders) == 1 and self.order == "shuffled" and not self.align_documents:
            return self.folders[0].manifest.identity
        tree = {
            "folders": [[folder.manifest.identity, str(folder.share)] for folder in self.folders],
            "order": self.order,
            "align_documents": self.align_documents,
        }
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode("ascii")).hexdigest()

    def check_capacity(self, context: int, global_batch: int) -> None:
        """Raises UserError where a folder cannot fill its share of one global batch."""
        for folder in self.folders:
            check_capacity(
                len(folder.training),
                context=context,
                global_batch=global_batch,
                where=f"data folder {folder.path}",
                share=folder.share,
            )

    def training(self, context: int) -> Stream | Mixture:
        """What the windows of ``sampler`` are read from."""
        streams = [self._aligned(folder) for folder in self.folders]
        return streams[0] if len(streams) == 1 else Mixture(streams, self._windows(context), context)

    def sampler(self, context: int, seed: int) -> Sampler | BlendedSampler:
        """Which window of ``training`` each sample is."""
        counts = self._windows(context)
        if len(counts) == 1:
            return Sampler(counts[0], seed, self.order)
        return BlendedSampler(counts, [folder.share for folder in self.folders], seed, self.order)

    def validation(self, context: int, tokens: int) -> TokenStream | Mixture | None:
        """A stream whose first windows are the validation set of so many tokens; None where none was opened.

        Of several folders it has their first windows in proportion to their shares, and no window twice: it ends
        where a folder has no more. Raises UserError for a folder without a window.
        """
        streams = [folder.validation for folder in self.folders]
        if len(streams) == 1 or None in streams:
            return streams[0]
        available = [windows(len(stream), context) for stream in streams]
        for folder, count in zip(self.folders, available, strict=True):
            if not count:
                raise UserError(
                    f"data folder {folder.path}: its {len(folder.validation)} validation tokens hold no window of "
                    f"{context + 1}: give it more, or leave validation out of --eval"
                )
        counts = proportional([folder.share for folder in self.folders], available, tokens // context)
        return Mixture(streams, counts, context)

    def _aligned(self, folder: Folder) -> Stream:
        if not self.align_documents:
            return folder.training
        return AlignedStream(folder.training, folder.manifest.content.tokenizer.end_of_text)

    def _windows(self, context: int) -> list[int]:
        return [windows(len(folder.training), context) for folder in self.folders]

    def record(self) -> dict[str, Any]:
        """For ``data.json``."""
        return {
            "identity": self.identity,
            "order": self.order,
            "align_documents": self.align_documents,
            "training_tokens": self.training_tokens,
            "validation_tokens": self.validation_tokens,
            "folders": [
                {
                    "folder": str(folder.path.resolve()),
                    "identity": folder.manifest.identity,
                    "share": str(folder.share),
                    "training_tokens": len(folder.training),
                    "validation_tokens": 0 if folder.validation is None else len(folder.validation),
                }
                for folder in self.folders
            ],
        }

    def describe(self, sequences: int, context: int) -> list[str]:
        """Lines on what a run of so many training sequences reads."""
        how = "" if self.order == "shuffled" else ", in sequential order"
        how += ", aligned with documents" * self.align_documents
        lines = [
            f"{self.training_tokens:,} training and {self.validation_tokens:,} validation tokens{how}, "
            f"identity {self.identity[:12]}"
        ]
        if len(self.folders) > 1:
            for folder, count in zip(self.folders, self._windows(context), strict=True):
                epochs = float(folder.share * sequences / count)
                lines.append(f"{float(folder.share):.4f} from {folder.path}, {epochs:.2f} epochs")
        return lines


def proportional(shares: Sequence[Fraction], available: Sequence[int], most: int) -> list[int]:
    """How many of each to take: in proportion to the shares (each within one of it), of no kind more than there are,
    ``most`` together or as many as there can be."""
    total = min([most, *(int((count + 1) / share) for share, count in zip(shares, available, strict=True))])
    while True:
        ends = [total * end.numerator // end.denominator for end in accumulate(shares)]
        counts = [end - start for start, end in pairwise([0, *ends])]
        if all(count <= limit for count, limit in zip(counts, available, strict=True)):
            return counts
        total -= 1


def open_data(
    paths: Sequence[Path],
    weights: Sequence[float] = (),
    order: Order = "shuffled",
    align_documents: bool = False,
    *,
    vocab_size: int,
    validating: bool,
) -> RunData:
    """Open and check folders of shards. Without weights each has the share that it has of all training tokens.

    Raises UserError for a folder that is no data set or does not fit the vocabulary, a damaged shard, a split that is
    missing, folders of different tokenizers, a folder that is named twice, and weights that are not one positive
    number a folder.
    """
    if weights and len(weights) != len(paths):
        raise UserError(
            f"--data-weights {' '.join(map(str, weights))}: {len(weights)} for {len(paths)} folders: give one for each "
            "folder of --data, in the same order, or none"
        )
    path, times = Counter(path.resolve() for path in paths).most_common(1)[0]
    if times > 1:
        raise UserError(f"--data: {path} is named {times} times: name it once, with a larger weight")
    opened = []
    for path in paths:
        manifest = load_manifest(path)
        check_vocabulary(manifest, vocab_size)
        validation = TokenStream.open(path, manifest, "val") if validating else None
        opened.append((path, manifest, TokenStream.open(path, manifest, "train"), validation))
    vocabulary = opened[0][1].content.tokenizer.sha256
    for path, manifest, *_ in opened[1:]:
        if manifest.content.tokenizer.sha256 != vocabulary:
            raise UserError(
                f"--data: {path} was tokenized with another vocabulary than {paths[0]}: blend folders of one tokenizer"
            )
    found = shares(weights or [len(training) for _, _, training, _ in opened])
    folders = [Folder(path, manifest, share, *streams) for (path, manifest, *streams), share in zip(opened, found)]
    return RunData(tuple(folders), order, align_documents)
