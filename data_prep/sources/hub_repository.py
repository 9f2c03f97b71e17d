"""A data set's repository: on the Hugging Face Hub, or a copy of it in a folder."""

import contextlib
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from data_prep.sources.source import UNIT_BYTES, File
from megaresid.errors import UserError

CARD = "README.md"
# Tries of one request or file. The library tries each several times by itself; with the waits this is five minutes.
TRIES = 8
MOST_SECONDS = 120
TRY_AGAIN_STATUS = (408, 429, 500, 502, 503, 504)

Result = TypeVar("Result")


class Folder:
    """A copy of a repository in a folder, read in place."""

    commit = None

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"--input {folder}: no such folder; name one with a copy of the data set's repository")

    def card(self) -> str | None:
        path = self.folder / CARD
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    def listing(self) -> list[File]:
        """All files but hidden ones (what download tools leave behind), each named by its path in the repository."""
        files = []
        for folder, below, names in os.walk(self.folder, followlinks=True):
            below[:] = [name for name in below if not name.startswith(".")]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                try:
                    state = path.stat()
                except OSError as error:
                    raise UserError(f"{path}: {error.strerror}; get a whole copy of the data set") from None
                files.append(File(path.relative_to(self.folder).as_posix(), state.st_size, str(state.st_mtime_ns)))
        return files

    def fetch(self, file: File) -> Path:
        return self.folder / file.name

    def is_here(self, file: File) -> bool:
        return True


class Remote:
    """A repository on the Hub, as it was at one commit.

    Nothing is asked of the network before ``listing``. Downloads go to the Hub library's own cache, where other tools
    find them too; a file that is in it is not downloaded again. A connection that breaks off goes on where it broke.
    A file of which only a part came is started anew when the process is started anew, or when the library gave it up:
    it keeps no such parts. Rate limits, errors of the server and lost connections are waited out, with a message, a
    bounded number of times for each file.

    ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` mean what they mean to the library; offline, the
    listing and the files must be in its cache.
    """

    def __init__(self, dataset: str, revision: str):
        self.dataset, self.revision = dataset, revision
        self.commit: str | None = None
        self._api = huggingface_hub.HfApi()
        # Of several downloads at once, in the middle of our own.
        huggingface_hub.utils.disable_progress_bars()

    def listing(self) -> list[File]:
        """All files at the commit that ``revision`` names now. ``commit`` is known after it."""
        folder = self._patiently(self._snapshot, f"{self.dataset}'s revision {self.revision}")
        self.commit = folder.name
        tree = self._patiently(self._tree, f"the listing of {self.dataset}")
        return [File(entry.path, entry.size, entry.blob_id) for entry in tree if isinstance(entry, RepoFile)]

    def card(self) -> str | None:
        """README.md, which ``listing`` downloads with the listing; None where there is none."""
        path = Path(self._cached(CARD) or "")
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    def fetch(self, file: File) -> Path:
        """Where the file is in the cache, downloaded if it was not."""
        # Of thousands of small files a line each would be too many.
        if file.bytes >= UNIT_BYTES:
            say(f"downloading {file.name} ({file.bytes / 2**20:,.0f} MiB)")
        download = functools.partial(
            self._api.hf_hub_download, self.dataset, file.name, repo_type="dataset", revision=self.commit
        )
        return Path(self._patiently(download, file.name))

    def is_here(self, file: File) -> bool:
        return self._cached(file.name) is not None

    def _cached(self, name: str) -> str | None:
        path = huggingface_hub.try_to_load_from_cache(self.dataset, name, repo_type="dataset", revision=self.commit)
        return path if isinstance(path, str) else None

    def _snapshot(self) -> Path:
        """The folder in the cache of the revision's commit, with the card in it. Leaves there what a later run needs
        without a network: which commit the revision is, and the listing."""
        offline = constants.HF_HUB_OFFLINE
        commit = None if offline else self._api.dataset_info(self.dataset, revision=self.revision).sha
        folder = Path(
            self._api.snapshot_download(
                self.dataset, repo_type="dataset", revision=self.revision, allow_patterns=CARD, max_workers=1
            )
        )
        # The library falls back on what it knew before when the Hub stops answering in between.
        if not offline and folder.name != commit:
            raise ConnectionError(f"the revision was {commit}, then {folder.name}")
        # Without a card there is none yet, and without it the library would not find the commit again.
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _tree(self) -> list[RepoFile]:
        # Older versions of the library have no such function and keep no listing.
        if cached := getattr(huggingface_hub, "get_cached_repo_tree", None):
            with contextlib.suppress(huggingface_hub.errors.CachedRepoTreeNotFoundError):
                return cached(self.dataset, repo_type="dataset", revision=self.commit)
        tree = self._api.list_repo_tree(self.dataset, recursive=True, revision=self.commit, repo_type="dataset")
        return list(tree)

    def _patiently(self, request: Callable[[], Result], what: str) -> Result:
        """The request's result; waits and asks again where that can help. Raises UserError where it cannot."""
        for number in range(1, TRIES + 1):
            try:
                return request()
            # The library for transfers in chunks, written in Rust, raises RuntimeError for everything.
            except (HTTPError, OSError, RuntimeError, HFValidationError) as raised:
                error = cause_of(raised)
                reason = self._reason_to_wait(error, what)
            if number < TRIES:
                seconds = seconds_to_wait(error, number)
                say(f"{what}: {reason}; trying again in {seconds:.0f} s ({number} of {TRIES - 1})")
                time.sleep(seconds)
        raise UserError(f"{what}: {reason}, {TRIES} times; --resume goes on with the job when the Hub answers again")

    def _reason_to_wait(self, error: Exception, what: str) -> str:
        """Why the request failed, where another try can succeed; raises UserError where none will."""
        page = f"{self._api.endpoint}/datasets/{self.dataset}"
        token = "log in (hf auth login) or set HF_TOKEN"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, HFValidationError):
            raise UserError(f"--dataset {self.dataset}: not a name on the Hub; it is like ORG/NAME") from None
        if isinstance(error, OfflineModeIsEnabled):
            raise UserError(
                f"{what}: not in the cache, and HF_HUB_OFFLINE is set; run once without it, or give a copy with --input"
            ) from None
        if isinstance(error, GatedRepoError):
            raise UserError(f"--dataset {self.dataset}: gated; accept its terms at {page}, then {token}") from None
        if isinstance(error, RepositoryNotFoundError):
            raise UserError(f"--dataset {self.dataset}: not at {page}; check the name; if it is private, {token}")
        if isinstance(error, RevisionNotFoundError):
            raise UserError(f"--revision {self.revision}: no such branch, tag or commit of {self.dataset}") from None
        if isinstance(error, EntryNotFoundError) and status is not None:
            raise UserError(f"{what}: no longer at {page}; start anew with the present --revision") from None
        if status in (401, 403):
            raise UserError(f"--dataset {self.dataset}: access refused ({status}); {token} that may read {page}")
        if status is not None and status not in TRY_AGAIN_STATUS:
            raise UserError(f"{what}: {first_line(error)}") from None
        # Of this machine, not of the network: a full disk, a folder that may not be written.
        if getattr(error, "errno", None) is not None and not isinstance(error, ConnectionError | TimeoutError):
            raise UserError(f"{constants.HF_HUB_CACHE}: {error.strerror}; HF_HOME names another folder") from None
        return "the Hub's rate limit is reached (a token raises it)" if status == 429 else first_line(error)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def cause_of(error: Exception) -> Exception:
    """What happened, from under the library's "not found in the local cache either"."""
    while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def seconds_to_wait(error: Exception, number: int) -> float:
    """What the server asks for, in Retry-After or as ``t`` in RateLimit; else longer after each try."""
    headers = error.response.headers if isinstance(error, HfHubHTTPError) else {}
    after = headers.get("Retry-After", "")
    asked = re.fullmatch(r"\d+", after) or re.search(r"(?<=;t=)\d+", headers.get("RateLimit", ""))
    return min(int(asked[0]), 600) if asked else min(2.0**number, MOST_SECONDS)
