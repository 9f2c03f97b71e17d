"""Sample text from a model: ``python -m megaresid.generate --run runs/first --prompt "The module"``"""

import codecs
import math
import sys
from pathlib import Path
from typing import Annotated

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import UserError, exits_with_user_errors

WORDS = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="TEXT",
    instance_from_str=lambda words: words[0],
    is_instance=lambda prompt: prompt is None or isinstance(prompt, str),
    str_from_instance=lambda prompt: [str(prompt)],
)
"""A text as it is: of itself tyro would take the word None for no prompt."""


def generate(
    run: Path,
    prompt: Annotated[str | None, WORDS] = None,
    tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    vocab_file: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
) -> None:
    """Write a prompt and what a model makes of it to standard output, each token as soon as it is drawn.

    The text ends after --tokens, or where the model ends the document. Each token is run once, and what attention needs
    of it is kept. A model with learned positions has none beyond its context: from there on, and where a mixer cannot
    go on from what it kept, every token runs the last context again, and what is before it is not seen.

    Args:
        run: A run directory, a checkpoint in one, or an exported folder.
        prompt: The text to continue, every word of it as ordinary text; without, a new document begins.
        tokens: How many tokens to add at most.
        temperature: Of the softmax; 0 takes the likeliest token each time.
        top_k: Sample from the k likeliest tokens only; 0 for all.
        top_p: Sample from the fewest tokens, likeliest first, whose probabilities reach this sum; at least one.
        seed: Of the sampling: with it the same machine writes the same text again.
        vocab_file: GPT-2 vocabulary, where it is neither installed nor cached.
    """
    _check(prompt, tokens, temperature, top_k, top_p, seed)
    choose_accelerator()
    from deepspeed.accelerator import get_accelerator

    from data_prep.tokenizer import gpt2_encoding
    from megaresid.sampling import Sampling, continuation, tokens_seen
    from megaresid.saved_run import open_saved

    encoding, saved = gpt2_encoding(vocab_file), open_saved(run)
    device = get_accelerator().current_device_name()
    model = saved.model().to(device)
    ids = [model.shape.end_of_text] if prompt is None else encoding.encode_ordinary(prompt)
    seen = tokens_seen(model)
    if seen is not None and len(ids) > seen:
        _note(f"the prompt has {len(ids):,} tokens: the model goes on from the last {seen:,}, all that it sees")
    sampling = Sampling(temperature, top_k, top_p)
    # On a CPU the text is made in fp32, whatever the run used.
    autocast = None if device == "cpu" else saved.dtype
    # Holds back a character whose last bytes are in tokens to come; what can be no character becomes U+FFFD.
    decoder, added = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
    if prompt is not None:
        print(encoding.decode(ids), end="", flush=True)
    for added, token in enumerate(continuation(model, ids, tokens, sampling, seed, autocast), start=1):
        print(decoder.decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    if added < tokens:
        _note(f"the document ends here, after {added:,} of {tokens:,} tokens")


def _check(prompt: str | None, tokens: int, temperature: float, top_k: int, top_p: float, seed: int) -> None:
    if prompt == "":
        raise UserError("--prompt '': it is empty; give a text, or leave --prompt out to begin a new document")
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature}: must be at least 0, and finite")
    if top_k < 0:
        raise UserError(f"--top-k {top_k}: must be at least 0")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p}: must be above 0, and at most 1")
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: must be at least 0, and below 2^64")


def _note(said: str) -> None:
    """To standard error: standard output holds the text alone."""
    print(f"note: {said}", file=sys.stderr, flush=True)


@exits_with_user_errors
def main() -> None:
    # A terminal of another encoding shows a question mark for what it has not.
    sys.stdout.reconfigure(errors="replace")
    try:
        tyro.cli(generate, prog="python -m megaresid.generate", args=sys.argv[1:])
    except KeyboardInterrupt:  # whoever reads has had enough
        print(flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
