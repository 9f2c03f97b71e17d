"""Files of evaluation data sets from the Hugging Face Hub, each of one commit."""

import sys
from pathlib import Path
from typing import NamedTuple

from megaresid.errors import UserError


class HubFile(NamedTuple):
    """A file of a data set at a commit, which does not change; ``size`` in MB is for the message."""

    dataset: str
    commit: str
    name: str
    size: float


def download(file: HubFile) -> Path:
    """The file in the Hub library's cache, downloaded with a message if it was not there.

    ``HF_HOME``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what they mean to the library. Raises
    UserError where the Hub cannot be reached or refuses.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, HTTPError

    where = {"repo_id": file.dataset, "filename": file.name, "repo_type": "dataset", "revision": file.commit}
    cached = huggingface_hub.try_to_load_from_cache(**where)
    if isinstance(cached, str):
        return Path(cached)
    what = f"{file.dataset}, {file.name} at {file.commit[:12]}"
    message = f"evaluation data: downloading {what} ({file.size:.1f} MB) to {constants.HF_HUB_CACHE}"
    print(message, file=sys.stderr, flush=True)
    try:
        return Path(huggingface_hub.hf_hub_download(**where))
    # The library for transfers in chunks, written in Rust, raises RuntimeError for everything.
    except (HTTPError, HFValidationError, OSError, RuntimeError) as error:
        raise UserError(
            f"evaluation data: {what}: cannot be downloaded ({_reason(error)}); where the Hub cannot be reached, give "
            "a folder with the files by --eval-data"
        ) from error


def _reason(error: BaseException) -> str:
    """What happened, in a line, from under the library's "not found in the local cache either"."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
