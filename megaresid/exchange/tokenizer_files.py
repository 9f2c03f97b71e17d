"""GPT-2's tokenizer as the files that ``AutoTokenizer.from_pretrained`` reads, made of the ranks of its tokens."""

import json
from pathlib import Path

from data_prep.tokenizer import END_OF_TEXT, Ranks
from megaresid.durable import write_text

END_OF_TEXT_TOKEN = "<|endoftext|>"


def write_tokenizer(folder: Path, ranks: Ranks, context: int) -> None:
    """Write ``vocab.json``, ``merges.txt`` (byte for byte those published with GPT-2) and ``tokenizer_config.json``."""
    write_text(folder / "vocab.json", vocabulary_text(ranks))
    write_text(folder / "merges.txt", merges_text(ranks))
    tree = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": context, "add_prefix_space": False}
    tree |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT_TOKEN)
    write_text(folder / "tokenizer_config.json", json.dumps(tree, indent=2) + "\n")


def spelling() -> list[str]:
    """The printable character that stands for each byte: itself, or one from U+0100 on."""
    printable = [chr(byte).isprintable() and chr(byte) != " " for byte in range(256)]
    others = [byte for byte in range(256) if not printable[byte]]
    return [chr(byte) if printable[byte] else chr(256 + others.index(byte)) for byte in range(256)]


def vocabulary_text(ranks: Ranks) -> str:
    """``vocab.json``: the id of each spelled token, by rising id."""
    characters = spelling()
    by_rank = sorted(ranks.items(), key=lambda entry: entry[1])
    vocabulary = {"".join(characters[byte] for byte in token): rank for token, rank in by_rank}
    return json.dumps(vocabulary | {END_OF_TEXT_TOKEN: END_OF_TEXT})


def merges_text(ranks: Ranks) -> str:
    """``merges.txt``: the two tokens that each token was merged of, by rising rank."""
    characters = spelling()
    lines = ["#version: 0.2"]
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) > 1:
            left, right = _halves(ranks, token, rank)
            lines.append(" ".join("".join(characters[byte] for byte in half) for half in (left, right)))
    return "\n".join(lines) + "\n"


def _halves(ranks: Ranks, token: bytes, rank: int) -> list[bytes]:
    """What is left of a token's bytes after all merges that come before its own."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        merged = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:])]
        first = min(range(len(merged)), key=merged.__getitem__)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts
