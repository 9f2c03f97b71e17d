"""Make a model of ours of Hugging Face GPT-2 weights: ``python -m megaresid.import_gpt2 --from gpt2 --out gpt2``

With the smallest GPT-2 the evaluation can be held to numbers that others measured, where the Hub can be reached::

    python -m megaresid.import_gpt2 --from gpt2 --out gpt2
    python -m megaresid.evaluate --run gpt2 --tasks "wikitext2 lambada hellaswag"

===================================  =============  =========================================================
wikitext2/token_ppl                  29.9           reported to huggingface/transformers; windows of 1024
wikitext2/word_ppl                   37.37          the same report, by lm-evaluation-harness
lambada/lastword_ppl, lastword_acc   40.055, .3256  reported to EleutherAI/lm-evaluation-harness, lambada_openai
hellaswag/acc, acc_norm              .2892, .3114   karpathy/build-nanogpt's hellaswag.py, by the same harness
===================================  =============  =========================================================

OpenAI's own numbers (Radford et al. 2019, table 3: WikiText-2 29.41, LAMBADA 35.13 and 45.99 %) are of other
preparations of the texts. HellaSwag's offline file differs from the Hub's in a few endings.
"""

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
