"""Take a model out of a run: ``python -m megaresid.export --run runs/first --format safetensors --out first``"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import exits_with_user_errors


def export(
    run: Annotated[Path, tyro.conf.arg(metavar="PATH")],
    format: Literal["hf", "safetensors"],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    vocab_file: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
) -> None:
    """Write a run's model, of any ZeRO stage and number of ranks, as a folder that stands by itself. Needs no GPU.

    The folder is written beside its place, read back, and takes its name when its logits are those of the checkpoint.

    Args:
        run: A run directory (its newest checkpoint), a checkpoint in one, or an exported folder.
        format: safetensors holds every model, with its description (megaresid.load(DIR) reads it); hf is a GPT-2 of
            Hugging Face's with its tokenizer, for vanilla residual connections and softmax attention.
        out: A folder that is not there yet.
        vocab_file: GPT-2 vocabulary for hf, where it is neither installed nor cached.
    """
    choose_accelerator()
    from megaresid.exchange.write import write_exported

    write_exported(run, format, out, vocab_file, say=lambda line: print(line, flush=True))


@exits_with_user_errors
def main() -> None:
    tyro.cli(export, prog="python -m megaresid.export", args=sys.argv[1:])


if __name__ == "__main__":
    main()
