import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import LONG_TEXTS, RUNS, SPACES, TEXTS, WORDS, byte_pair_encode

from data_prep import backends
from data_prep.backends import Gigatoken, Tiktoken, open_backend
from data_prep.tokenizer import gpt2_ranks
from megaresid.errors import UserError

RANKS = gpt2_ranks()


@pytest.fixture(scope="module")
def tiktoken():
    return Tiktoken(RANKS)


@pytest.fixture(scope="module")
def gigatoken(tiktoken):
    pytest.importorskip("gigatoken")
    return Gigatoken(RANKS, tiktoken)


@pytest.fixture(scope="module", params=["tiktoken", "gigatoken"])
def backend(request):
    return request.getfixturevalue(request.param)


@settings(deadline=None, max_examples=200)
@given(text=TEXTS)
def test_ids_are_byte_pair_encoding_by_definition(backend, text):
    assert backend.encode(text.encode()).tolist() == byte_pair_encode(text)


def test_published_examples(backend):
    assert backend.encode(b"Hello, world!").tolist() == [15496, 11, 995, 0]
    fox = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]
    assert backend.encode(b"The quick brown fox jumps over the lazy dog").tolist() == fox


@pytest.mark.parametrize("text", ["<|endoftext|>", "a<|endoftext|>b", " <|endoftext|>\n<|endoftext|><|endoftext|>"])
def test_a_literal_end_of_text_is_ordinary_text(backend, text):
    ids = backend.encode(text.encode()).tolist()
    assert ids == byte_pair_encode(text) and 50256 not in ids


# Every plane's characters alike, those of a script together, and odd white space and marks.
SCRIPTS = [(0x20, 0x7F), (0x80, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00), (0x2000, 0x2070)]
SCRIPTS += [(0x088F, 0x0890), (0x0CDC, 0x0CDD), (0xA7C0, 0xA7F2), (0x10940, 0x10960), (0x323A0, 0x323D0)]
SCRIPTS += [(0x3000, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A0), (0x1F300, 0x1FAFF), (0x20000, 0x2A000), (0, 0x20)]
RUNS_OF_A_SCRIPT = st.sampled_from(SCRIPTS).flatmap(
    lambda bounds: st.text(st.characters(min_codepoint=bounds[0], max_codepoint=bounds[1] - 1), max_size=30)
)
MIXED = st.lists(st.one_of(st.sampled_from(WORDS + SPACES + RUNS), RUNS_OF_A_SCRIPT), max_size=30).map("".join)


@settings(deadline=None, max_examples=500)
@given(text=st.one_of(MIXED, LONG_TEXTS))
def test_backends_agree(tiktoken, gigatoken, text):
    assert np.array_equal(tiktoken.encode(text.encode()), gigatoken.encode(text.encode()))


def in_every_context(character):
    """A text whose ids change with the class (letter, number, white space, other) that the character is taken for."""
    c = character
    return f"{c}'ll {c}'re\n{c}{c}'s1{c} {c}  a{c}'s! {c}!{c}\u00a0{c} \n {c}{c}1".encode()


def test_backends_agree_on_the_characters_that_one_does_not_know(tiktoken, gigatoken):
    points = {point for first, last in backends.NEW_RANGES for point in range(first - 20, last + 21)}
    for text in map(in_every_context, map(chr, sorted(points))):
        assert np.array_equal(tiktoken.encode(text), gigatoken.encode(text)), text.decode()[0]


@pytest.mark.full
def test_backends_agree_on_every_character(tiktoken, gigatoken):
    for point in (*range(0xD800), *range(0xE000, 0x110000)):
        text = in_every_context(chr(point))
        assert np.array_equal(tiktoken.encode(text), gigatoken.encode(text)), hex(point)


@pytest.mark.parametrize("run", ["a", "^", " ", "\n", "7", "字", "ab", " a", "'s", "\u00a0", "🙂", "<|endoftext|>"])
def test_backends_agree_on_long_runs(tiktoken, gigatoken, run):
    text = (run * 65536).encode()[:65536].decode("utf-8", "ignore").encode()
    for end in (b"", b"x", b" ", b"\n"):
        assert np.array_equal(tiktoken.encode(text + end), gigatoken.encode(text + end))


def random_text(generator, size):
    """Words of WORDS, letters of a few scripts, white space; about 10 ``size`` characters."""
    pieces = []
    for _ in range(size):
        script = generator.choice(SCRIPTS)
        letters = (chr(generator.randrange(*script)) for _ in range(generator.randrange(12)))
        pieces += ["".join(letters), generator.choice(WORDS), generator.choice([" ", " ", *SPACES])]
    return "".join(pieces).encode()


@pytest.mark.parametrize("seed", range(3))
def test_backends_agree_on_long_texts(tiktoken, gigatoken, seed):
    text = random_text(random.Random(seed), 10_000)
    assert np.array_equal(tiktoken.encode(text), gigatoken.encode(text))


@pytest.mark.full
def test_backends_agree_on_many_texts(tiktoken, gigatoken):
    generator = random.Random(7)
    for _ in range(5000):
        text = random_text(generator, generator.choice([1, 4, 20, 200]))
        assert np.array_equal(tiktoken.encode(text), gigatoken.encode(text)), text


def test_auto_takes_gigatoken_where_it_can_be_imported(tiktoken, monkeypatch):
    pytest.importorskip("gigatoken")
    assert open_backend("auto", RANKS, tiktoken).name == open_backend("gigatoken", RANKS, tiktoken).name == "gigatoken"
    assert open_backend("tiktoken", RANKS, tiktoken) is tiktoken
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert open_backend("auto", RANKS, tiktoken) is tiktoken
    with pytest.raises(UserError, match=r"^--tokenizer-backend gigatoken: .*\[fast\]"):
        open_backend("gigatoken", RANKS, tiktoken)


def test_what_gigatoken_remembers_is_dropped_when_memory_has_grown(tiktoken, gigatoken, monkeypatch):
    made, resident = [], 10**9
    renew = gigatoken._renew
    monkeypatch.setattr(gigatoken, "_renew", lambda: (made.append(resident), renew()))
    monkeypatch.setattr(backends, "resident_bytes", lambda: resident)
    monkeypatch.setattr(backends, "CHECKED_BYTES", 100)
    gigatoken._renew()
    text = b"a word or two. " * 8
    for growth, renewals in ((0, 1), (backends.MOST_GROWTH, 1), (backends.MOST_GROWTH + 1, 2), (0, 2)):
        resident += growth
        assert np.array_equal(gigatoken.encode(text), tiktoken.encode(text)), growth
        assert len(made) == renewals
        resident -= growth if renewals == 1 else 0
    # Not before so much text has come since the last look.
    resident *= 2
    for renewals in (2, 2, 2, 3, 3, 3, 3):
        gigatoken.encode(text[:30])
        assert len(made) == renewals


def test_resident_bytes_follows_what_is_allocated():
    before = backends.resident_bytes()
    block = np.ones(64 * 2**20, np.uint8)
    assert 60 * 2**20 < backends.resident_bytes() - before < 80 * 2**20
    del block


@pytest.mark.full
def test_memory_stays_bounded_whatever_the_words():
    code = """
import re
from pathlib import Path
import numpy as np
from data_prep.backends import Gigatoken, Tiktoken
from data_prep.tokenizer import gpt2_ranks
ranks = gpt2_ranks()
backend, generator = Gigatoken(ranks, Tiktoken(ranks)), np.random.default_rng(0)
for _ in range(160):
    text = generator.integers(97, 123, 2**20).astype(np.uint8)
    text[::9] = 32
    for start in range(0, 2**20, 2**16):
        backend.encode(text[start : start + 2**16].tobytes())
# Of this process alone: what getrusage tells may be its parent's.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
    pytest.importorskip("gigatoken")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) * 1024 < 700 * 2**20
