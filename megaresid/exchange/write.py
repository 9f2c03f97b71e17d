"""Writing a model in one of two forms, or one of Hugging Face's in ours, with the check that it is the same model."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megaresid.durable import write_text
from megaresid.exchange.aside import check_new, written_aside
from megaresid.exchange.check import logits_on, require_close, require_equal, require_equal_parameters
from megaresid.exchange.folder import describe, open_folder, write_description
from megaresid.exchange.gpt2_config import check_is_gpt2, config_of
from megaresid.exchange.gpt2_folder import GPT2Folder
from megaresid.exchange.gpt2_hub import folder_of
from megaresid.exchange.gpt2_names import PREFIX, our_names, pairs, to_gpt2
from megaresid.exchange.hugging_face import gpt2_at, require_transformers
from megaresid.exchange.weights import write_weights
from megaresid.model.gpt import GPT, canonical_parameters
from megaresid.model.plan import ModelPlan
from megaresid.saved_run import Saved, open_saved

Say = Callable[[str], None]


def write_exported(run: Path, format: str, out: Path, vocab_file: Path | None, say: Say) -> None:
    """Write what is saved at ``run`` to the new folder ``out`` as ``hf`` or ``safetensors``; ``say`` is given lines.

    Raises UserError for a mistake before anything is written, and for a failed check, which leaves nothing. At most
    one model, or one file of weights, is in memory.
    """
    check_new(out)
    saved = open_saved(run)
    ranks = None
    if format == "hf":
        from data_prep.tokenizer import gpt2_ranks

        check_is_gpt2(saved.plan)
        require_transformers()
        ranks = gpt2_ranks(vocab_file)
    say(f"model     step {saved.step} of {run}, spec {saved.plan.hash[:12]}")
    before = logits_of(saved) if runs_here(saved.plan) else None
    with written_aside(out) as folder:
        if ranks is not None:
            write_gpt2(saved, folder, ranks, say)
            told = _held_to_transformers(before, saved, folder, f"--out {out}")
        else:
            write_folder(saved, folder, say)
            written = open_folder(folder)
            if before is None:
                names = list(written.description.parameters)
                told = require_equal_parameters(saved.parameters(names), written.parameters(names), f"--out {out}")
            else:
                told = require_equal(before, logits_of(written), f"--out {out}")
    say(f"check     {told}")
    say(f"done      {out}")


def write_imported(source: str, out: Path, say: Say) -> None:
    """Write Hugging Face GPT-2 weights, of a folder or the Hub, as a self-describing folder. Raises UserError as
    ``write_exported`` does."""
    check_new(out)
    require_transformers()
    saved = GPT2Folder(*folder_of(source, say))
    say(f"model     {source}, spec {saved.plan.hash[:12]}")
    with written_aside(out) as folder:
        write_folder(saved, folder, say)
        written = open_folder(folder)
        told = _held_to_transformers(logits_of(written), written, saved.folder, f"--out {out}")
    say(f"check     {told}")
    say(f"done      {out}")


def _held_to_transformers(ours: list[Tensor], saved: Saved, folder: Path, what: str) -> str:
    """Compare our model's logits with those that ``transformers`` computes of a folder; one model at a time."""

    def theirs(dtype: torch.dtype) -> list[Tensor]:
        return logits_on(gpt2_at(folder, dtype), saved.plan.shape)

    return require_close(
        ours, theirs(torch.float32), lambda: (logits_of(saved, torch.float64), theirs(torch.float64)), what
    )


def logits_of(saved: Saved, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of a saved model, which is in memory for as long as this takes; on the GPU only where a mixer runs nowhere
    else."""
    model = saved.model().to("cuda" if needs_gpu(saved.plan) else "cpu", dtype)
    return logits_on(lambda ids: model(ids.to(model.head.weight.device))[0], saved.plan.shape)


def needs_gpu(plan: ModelPlan) -> bool:
    mixers = (plan.mixer_class(layer) for layer in range(plan.shape.layers))
    return any(cls.needs_of(options) for cls, options in mixers)


def runs_here(plan: ModelPlan) -> bool:
    """Whether logits can be computed: some mixers have kernels for a GPU alone."""
    return torch.cuda.is_available() or not needs_gpu(plan)


def write_folder(saved: Saved, folder: Path, say: Say) -> None:
    """Write a self-describing folder."""
    shapes = {name: list(shape) for name, shape in parameter_shapes(saved.plan).items()}
    files = write_weights(folder, shapes, saved.parameters(shapes), say)
    write_description(
        folder,
        describe(
            saved.plan,
            source=saved.source,
            step=saved.step,
            data=saved.data,
            dtype=saved.dtype,
            parameters=shapes,
            files=files,
        ),
    )


def parameter_shapes(plan: ModelPlan) -> dict[str, torch.Size]:
    """By canonical name, in the model's order."""
    with torch.device("meta"):
        model = GPT(plan)
    return {name: p.shape for name, p in canonical_parameters(model, model.prefixes).items()}


def write_gpt2(saved: Saved, folder: Path, ranks: dict[bytes, int], say: Say) -> None:
    """Write a GPT-2 in Hugging Face's form."""
    from megaresid.exchange.tokenizer_files import write_tokenizer

    shape = saved.plan.shape
    shapes = {PREFIX + pair.theirs: pair.shape for pair in pairs(shape)}
    write_weights(folder, shapes, to_gpt2(shape, saved.parameters(our_names(shape))), say)
    write_tokenizer(folder, ranks, shape.context)
    write_text(folder / "config.json", json.dumps(config_of(shape), indent=2) + "\n")
    ends = {"bos_token_id": shape.end_of_text, "eos_token_id": shape.end_of_text}
    write_text(folder / "generation_config.json", json.dumps(ends, indent=2) + "\n")
