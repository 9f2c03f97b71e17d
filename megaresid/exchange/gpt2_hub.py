"""GPT-2's weights from the Hugging Face Hub, where they are asked for by name."""

from collections.abc import Callable
from pathlib import Path

from megaresid.errors import UserError

PUBLISHED = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OWNER = "openai-community"


def folder_of(source: str, say: Callable[[str], None]) -> tuple[Path, str]:
    """A local folder of that name, or the files of the Hub's repository in the Hub library's cache, downloaded where
    they are not in it; and what it is to be called. Raises UserError where there is neither."""
    if Path(source).is_dir():
        return Path(source), Path(source).resolve().name
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    repository = f"{OWNER}/{source}" if source in PUBLISHED else source
    say(f"source    the Hub's {repository}, downloaded where it is not cached")
    try:
        found = huggingface_hub.snapshot_download(
            repository, allow_patterns=["config.json", "model*.safetensors", "model.safetensors.index.json"]
        )
    except HFValidationError:
        raise UserError(f"--from {source}: neither a folder nor a name on the Hub, such as gpt2 or ORG/NAME") from None
    except RepositoryNotFoundError:
        raise UserError(f"--from {source}: neither a folder nor at the Hub: check the name") from None
    except LocalEntryNotFoundError:
        raise UserError(
            f"--from {source}: not a folder, not in the Hub's cache, and the Hub cannot be reached: give a folder with "
            "config.json and model.safetensors"
        ) from None
    except OSError as error:
        raise UserError(f"--from {source}: the Hub's {repository}: {str(error).splitlines()[0]}") from error
    say(f"revision  {Path(found).name}")
    return Path(found), f"{repository} at {Path(found).name}"
