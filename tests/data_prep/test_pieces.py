import random

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import LONG_TEXTS

from data_prep import pieces
from data_prep.pieces import cut, whole_characters
from data_prep.tokenizer import gpt2_encoding

ENCODE = gpt2_encoding().encode_ordinary


def ids_of(found):
    return [id for piece, _ in found for id in ENCODE(piece.decode())]


@settings(deadline=None, max_examples=400)
@given(text=LONG_TEXTS, size=st.integers(30, 90), near=st.integers(0, 20))
def test_pieces_give_the_ids_of_the_whole(text, size, near):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", size)
        patch.setattr(pieces, "NEAR", near)
        found = list(cut(text.encode()))
    assert b"".join(piece for piece, _ in found) == text.encode()
    assert all(0 < len(piece) <= size for piece, _ in found)
    # By definition: the pieces between two that were cut inside a pre-token are as if encoded together.
    runs = [b""]
    for piece, inside in found:
        runs[-1] += piece
        if inside:
            runs.append(b"")
    assert ids_of(found) == [id for run in runs for id in ENCODE(run.decode())]
    # A piece is cut inside only where it has no space after something else.
    for piece, inside in found:
        assert not (inside and regex.search(r"[^\s\x1c-\x1f] ", piece.decode()))


# Kinds of characters as tiktoken's pattern has them, of which Unicode's versions agree; and some of which they do not.
KINDS = [
    "azAZéñßЖяΩλ字一龥ぁんァヺ가힣",
    "0129０９",
    "!&(/:@[`{~、。「」！？，",
    "'",
    " \n\t\u3000\x1c\x85",
    "٣ⅷ²ªʰ々ー\u0301🙂",
]
UNSURE = "\U0001e6e0\u058c\u0cdc\ua7ce\U00010940"


@settings(deadline=None, max_examples=600)
@given(data=st.data())
def test_a_boundary_is_one_whatever_comes_before_and_after(data):
    characters = st.sampled_from("".join(KINDS) + UNSURE)
    text = "".join(data.draw(st.lists(st.one_of(characters, st.sampled_from(["'re", "'ll", "'s"])), max_size=14)))
    whole = ENCODE(text)
    for match in pieces.BOUNDARY.finditer(text):
        if place := match.start():
            assert ENCODE(text[:place]) + ENCODE(text[place:]) == whole, (text, place)


@pytest.mark.parametrize("letter", UNSURE)
def test_what_versions_of_unicode_differ_in_is_no_place_to_cut(letter, monkeypatch):
    text = (letter + "'ll") * 20_000
    found = list(cut(text.encode()))
    assert all(piece.decode()[-1] == "l" or inside for piece, inside in found)
    if not any(inside for _, inside in found):
        assert ids_of(found) == ENCODE(text)


def test_a_short_document_is_one_piece(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 9)
    assert list(cut(b"a b c d e")) == [(b"a b c d e", False)]
    assert list(cut(b"a b c d ef")) == [(b"a b c d", False), (b" ef", False)]


def test_one_endless_run_is_cut_and_counted(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 50)
    found = list(cut(b"b c" + b"a" * 120 + b" d e"))
    # "b" ends before a sure boundary; " c" and the run are one pre-token.
    run = b" c" + b"a" * 120
    assert found == [(b"b", False), (run[:50], True), (run[50:100], True), (run[100:] + b" d e", False)]


def test_a_cut_inside_a_run_is_between_characters(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 50)
    found = list(cut(("字" * 40).encode()))
    assert found == [("字".encode() * 16, True), ("字".encode() * 16, True), ("字".encode() * 8, False)]


@pytest.mark.parametrize("near", range(1, 8))
def test_a_cut_character_before_the_boundary_is_not_taken_for_another(monkeypatch, near):
    # Where the search near the end begins inside the wide white space, the space after it is no boundary.
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20)
    monkeypatch.setattr(pieces, "NEAR", near)
    text = "abcdef ghijk\u3000 \u3000xyzabc"
    found = list(cut(text.encode()))
    assert len(found) == 2 and not found[0][0].decode()[-1].isspace()


@pytest.mark.parametrize("run", ["a", "^", " ", "7", "字"])
def test_a_million_of_one_character(run):
    text = run.encode() * 1_000_000
    found = list(cut(text))
    most = pieces.PIECE_BYTES - pieces.PIECE_BYTES % len(run.encode())
    assert [len(piece) for piece, _ in found] == [most] * (len(text) // most) + [len(text) % most]
    assert [inside for _, inside in found] == [True] * (len(found) - 1) + [False]


@pytest.mark.parametrize(
    "words",
    [
        ["the", "cat,", "said:", "\n\nIt's", "12", "(naïve)", "  "],
        ["the\u3000", "cat,\u00a0", "'ll", "\u2028", "said:\t"],
        ["我", "们。", "日本語、", "テスト", "１２", "「"],
    ],
)
def test_a_long_real_text_is_not_cut(words):
    joined = " ".join if words[0] == "the" else "".join
    text = joined(random.Random(0).choices(words, k=60_000))
    found = list(cut(text.encode()))
    assert len(found) > 3 and not any(inside for _, inside in found)
    assert ids_of(found) == ENCODE(text)


@given(text=st.text(min_size=1, max_size=20), place=st.integers(0, 80))
def test_whole_characters_by_definition(text, place):
    data = text.encode()
    place = min(place, len(data))
    ends = [len(text[:n].encode()) for n in range(len(text) + 1)]
    assert whole_characters(data, place) == max(end for end in ends if end <= place)
