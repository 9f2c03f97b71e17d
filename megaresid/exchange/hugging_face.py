"""``transformers``' own GPT-2, as the other side of the check. Imported late: it takes seconds."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megaresid.errors import UserError


def require_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("transformers is missing, which checks the result: pip install 'megaresid[eval]'") from None


def gpt2_at(folder: Path, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """``AutoModelForCausalLM`` of a local folder, on the CPU: ids [B, T] -> logits [B, T, V].

    Raises UserError where ``transformers`` cannot read it, or finds parameters missing or beyond its own.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: transformers cannot read it: {' '.join(str(error).split())}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: transformers finds no {missing[0]} in it: get a good copy")
    model.eval()
    return lambda ids: model(ids).logits
