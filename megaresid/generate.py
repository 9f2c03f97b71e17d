"""Sample text from a run: ``python -m megaresid.generate --run runs/first --prompt "The module"``"""

import math
import sys
from pathlib import Path
from typing import Annotated

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.errors import UserError, exits_with_user_errors


def generate(
    run: Path,
    prompt: str,
    tokens: int = 120,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    vocab_file: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None,
) -> str:
    """Continue a prompt with a run's newest checkpoint; every token runs the whole context again.

    Args:
        run: A run directory, or a checkpoint in one.
        prompt: The text to continue; an empty one starts from <|endoftext|>.
        tokens: How many tokens to add.
        temperature: Of the softmax; 0 takes the likeliest token each time.
        top_k: Sample from the k likeliest tokens only; 0 for all.
        seed: Of the sampling.
        vocab_file: GPT-2 vocabulary, where it is neither installed nor cached.
    """
    if tokens < 1:
        raise UserError(f"--tokens {tokens}: must be at least 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature}: must be at least 0, and finite")
    if top_k < 0:
        raise UserError(f"--top-k {top_k}: must be at least 0")
    choose_accelerator()
    import torch

    from data_prep.tokenizer import gpt2_encoding
    from megaresid.saved_run import load_model

    encoding = gpt2_encoding(vocab_file)
    model = load_model(run)
    context = model.shape.context
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for _ in range(tokens):
            logits, _ = model(torch.tensor([ids[-context:]]))
            ids.append(_choose(logits[0, -1].float(), temperature, top_k, generator))
    return encoding.decode(ids)


def _choose(logits, temperature: float, top_k: int, generator) -> int:
    """One token id from logits [V]."""
    import torch

    if temperature == 0:
        return int(logits.argmax())
    if top_k:
        threshold = logits.topk(min(top_k, logits.numel())).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator))


@exits_with_user_errors
def main() -> None:
    print(tyro.cli(generate, prog="python -m megaresid.generate", args=sys.argv[1:]))


if __name__ == "__main__":
    main()
