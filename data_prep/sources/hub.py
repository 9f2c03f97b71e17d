"""Data sets of the Hugging Face Hub: files of one commit, the next ones downloaded while the present one is read."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import constants

from data_prep.sources.checked import Filters
from data_prep.sources.grouping import groups
from data_prep.sources.hub_layout import select
from data_prep.sources.hub_repository import Folder, Remote
from data_prep.sources.jsonl import JsonReader
from data_prep.sources.parquet import ParquetReader
from data_prep.sources.source import WHOLE, File, Reader, Share, Source, Unit
from megaresid.errors import UserError

FINEWEB_DATASET, FINEWEB_CONFIG = "HuggingFaceFW/fineweb", "sample-10BT"
# Files on their way while one is read.
AHEAD = 2


class Hub(Source):
    """One configuration of a data set, from the Hub or from a copy of its repository in a folder.

    ``files`` are named by their paths in the repository and sorted by them; from the Hub they are those of one commit,
    whatever becomes of the branch. A resumed job whose branch has moved is refused, and goes on with
    ``--revision`` and the commit that its plan names; so do machines that share one.
    """

    def __init__(self, kind: str, repository: Folder | Remote, files: list[File], reader: Reader, **named: str | None):
        """``named``: what the manifest calls it, dataset and config."""
        super().__init__(files, reader)
        self.kind, self.repository, self.named = kind, repository, named
        self._downloads: dict[str, Future[Path]] = {}

    def fetch(self, file: File) -> Path:
        if self.repository.is_here(file):
            return self.repository.fetch(file)
        return self._download(file).result()

    def units(self, share: Share = WHOLE) -> Iterator[Unit]:
        wanted = self.wanted(share)
        places = {file.name: place for place, file in enumerate(wanted)}
        for unit in super().units(share):
            yield unit
            # Not before the first unit was taken up and another is asked for: a look at one needs no more files.
            after = places[unit.segments[-1].name] + 1
            for file in wanted[after : after + AHEAD]:
                if not self.repository.is_here(file):
                    self._download(file)

    def wanted(self, share: Share) -> list[File]:
        """The files in which units of the share can begin."""
        wanted, position = [], 0
        for run in groups(self.files):
            size = sum(file.bytes for file in run)
            if share.meets(position, size, self.bytes):
                wanted.extend(run)
            position += size
        return wanted

    def check_unchanged(self) -> None:
        """A commit does not change; of a copy in a folder the workers check the sizes."""

    @property
    def download_folder(self) -> Path:
        """The Hub library's cache, where downloads go."""
        return Path(constants.HF_HUB_CACHE)

    def download_bytes(self, share: Share = WHOLE) -> int:
        """What the share still has to download."""
        return sum(file.bytes for file in self.wanted(share) if not self.repository.is_here(file))

    def describe(self, documents_sha256: str) -> dict[str, str]:
        named = self.named | {"commit": self.repository.commit}
        return super().describe(documents_sha256) | {key: value for key, value in named.items() if value is not None}

    def _download(self, file: File) -> Future[Path]:
        """The file on its way: one download, however often it is asked for."""
        if file.name not in self._downloads:
            future = self._downloads[file.name] = Future()
            # A daemon: a job that ends by an error does not wait for gigabytes.
            threading.Thread(target=self._run, args=(file, future), daemon=True).start()
        return self._downloads[file.name]

    def _run(self, file: File, future: Future[Path]) -> None:
        try:
            future.set_result(self.repository.fetch(file))
        except BaseException as error:
            future.set_exception(error)


def open_hub(job) -> Hub:
    """The source that the options of a job (data_prep.job.Job) name, with ``--source fineweb`` or ``hub``.

    With ``--input`` the repository is that folder, and the network is not used; else the files are listed, and the
    revision becomes a commit. Raises UserError for what is not there or not allowed.
    """
    fineweb = job.source == "fineweb"
    dataset = job.dataset or (FINEWEB_DATASET if fineweb else None)
    config = job.dataset_config or (FINEWEB_CONFIG if fineweb else None)
    if job.input:
        if len(job.input) > 1:
            raise UserError(f"--input {job.input[1]}: --source {job.source} reads one folder, a copy of the repository")
        repository = Folder(Path(job.input[0]))
    elif dataset is None:
        raise UserError("--dataset: --source hub needs the data set's name, ORG/NAME, or a copy of it with --input")
    else:
        repository = Remote(dataset, job.revision)
    files = {file.name: file for file in repository.listing()}
    kind, names = select(list(files), repository.card(), config, fineweb)
    reader = (ParquetReader if kind == "parquet" else JsonReader)(job.text_column, Filters.of(job))
    return Hub(job.source, repository, [files[name] for name in names], reader, dataset=dataset, config=config)
