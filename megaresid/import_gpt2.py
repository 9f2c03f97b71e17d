"""Make a model of ours of Hugging Face GPT-2 weights: ``python -m megaresid.import_gpt2 --from gpt2 --out gpt2``"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import exits_with_user_errors


def import_gpt2(
    source: Annotated[str, tyro.conf.arg(name="from", metavar="NAME|DIR")],
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
) -> None:
    """Write GPT-2 weights in Hugging Face's form as a folder that megaresid.load, generate and evaluate read.

    The folder is written beside its place, read back, and takes its name when its logits are those of transformers'
    own GPT-2.

    Args:
        source: A folder with config.json and model.safetensors (or several, with an index), or a name on the Hub: gpt2,
            gpt2-medium, gpt2-large, gpt2-xl or ORG/NAME. Pickled weights are refused.
        out: A folder that is not there yet.
    """
    choose_accelerator()
    from megaresid.exchange.write import write_imported

    write_imported(source, out, say=lambda line: print(line, flush=True))


@exits_with_user_errors
def main() -> None:
    tyro.cli(import_gpt2, prog="python -m megaresid.import_gpt2", args=sys.argv[1:])


if __name__ == "__main__":
    main()
