"""What softmax attention carries while a text is generated: the keys and values of the tokens that are still seen."""

import torch

from megaresid.attention.cache import Cache

SEEN = "seen"


def tokens_seen(cache: Cache | None) -> int:
    """By all calls of ``carried`` before this one."""
    return 0 if cache is None or SEEN not in cache.tensors else int(cache.tensors[SEEN])


def carried(cache: Cache, tokens: dict[str, torch.Tensor], window: int | None) -> dict[str, torch.Tensor]:
    """``tokens`` (by name, [B, T, ...]) after those before them: [B, S, ...] with S >= T.

    With a window its last ``window`` - 1 tokens are kept from call to call; without, all of them, in memory for
    ``cache.length`` tokens that is taken at the first call.
    """
    start = tokens_seen(cache)
    place = _in_window if window is not None else _in_place
    together = {name: place(cache, name, new, start, window) for name, new in tokens.items()}
    length = next(iter(tokens.values())).shape[1]
    cache.tensors[SEEN] = torch.tensor(start + length)  # on the CPU, where reading it waits for nothing
    return together


def _in_place(cache: Cache, name: str, new: torch.Tensor, start: int, window: None) -> torch.Tensor:
    if name not in cache.tensors:
        cache.tensors[name] = new.new_empty(new.shape[0], cache.length, *new.shape[2:])
    end = start + new.shape[1]
    if end > cache.length:
        raise ValueError(f"the cache was made for {cache.length} tokens, and this call ends at token {end}")
    cache.tensors[name][:, start:end] = new
    return cache.tensors[name][:, :end]


def _in_window(cache: Cache, name: str, new: torch.Tensor, start: int, window: int) -> torch.Tensor:
    together = torch.cat([cache.tensors[name], new], 1) if name in cache.tensors else new
    kept = min(window - 1, together.shape[1])
    cache.tensors[name] = together[:, together.shape[1] - kept :].clone()
    return together
