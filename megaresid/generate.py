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
    """Continue a prompt with a run's newest checkpoint.

    Each token is run once, and what attention needs of it is kept. A model with learned positions has none beyond its
    context: from there on, and where a mixer cannot go on from what it kept, every token runs the last context again.

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
    ids = encoding.encode_ordinary(prompt) or [encoding.eot_token]
    room = model.shape.context if model.plan.has_positions else len(ids) + tokens
    cache = model.init_cache(room)
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        for _ in range(tokens):
            if len(ids) > room:
                cache = None
            ids.append(_choose(_next_logits(model, ids, cache), temperature, top_k, generator))
    return encoding.decode(ids)


def _next_logits(model, ids: list[int], cache):
    """Logits [V] of the token after ``ids``; with a cache, only those that it has not seen are run."""
    import torch

    new = ids[-model.shape.context :] if cache is None else ids[cache.position :]
    logits, _ = model(torch.tensor([new]), cache=cache)
    return logits[0, -1].float()


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
