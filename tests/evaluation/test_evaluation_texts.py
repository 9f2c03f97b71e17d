"""WikiText-2's pages and LAMBADA's last words are lm-evaluation-harness's."""

import itertools
import re

import pytest
from eval_data import BYTES, REAL, needs_real_data, small_data
from hypothesis import given, settings
from hypothesis import strategies as st

from megaresid.evaluation.data import FIELDS, find, read_rows
from megaresid.evaluation.perplexity import encoded_pair
from megaresid.evaluation.texts import (
    count_words,
    detokenized,
    split_last_word,
    wikitext2_pages,
    wikitext2_rows,
    wikitext2_stream,
)

PIECES = [*" \n\t=()[]{}\"'@:;.,!?°/-0N2sxé", " N ", " ' ", "s '", "/' 3/", "= "]
WIKITEXT = st.lists(st.sampled_from(PIECES), max_size=40)
MANY = settings(max_examples=300, deadline=None)


@pytest.mark.parametrize(
    "spaced, joined",
    [
        ("a @-@ b @,@ c @.@ d", "a-b,c.d"),
        ("a : b ; c . d ! e ? f , g", "a: b; c. d! e? f, g"),
        ("a ( b ) [ c ] { d } e", "a (b) [c] {d} e"),
        ('a " b " c', 'a "b" c'),
        ("a ' b ' c", "a 'b' c"),
        ("a ( b [ c ) d ] e", "a (b [c) d] e"),
        ("players ' gains", "players' gains"),
        ("the dog 's", "the dog's"),
        ("players ' gains and the dog 's", "players'gains and the dog's"),
        (" = = A = = \n \n = = = = B = = = = \n", " == A ==\n\n==== B ====\n"),
        ("20 ° C , N N miles", "20°C, 1 N miles"),
        ("an N mile", "an 1 mile"),
        ("/' 3/", "/'[0-9]/"),
        (" leading and trailing ", " leading and trailing "),
        ("", ""),
    ],
)
def test_wikitexts_spaces_are_undone(spaced, joined):
    assert detokenized(spaced) == joined


def test_marks_move_left_in_turn():
    """A mark that has moved has no space before it, so one to its left whose turn comes later stays where it is."""
    for first, second in itertools.combinations(":;.!?,", 2):
        assert detokenized(f"a {second} {first} b") == f"a {second}{first} b"
        assert detokenized(f"a {first} {second} b") == f"a{first}{second} b"


@MANY
@given(WIKITEXT.map("".join))
def test_any_text_is_detokenized_as_lm_eval_does(text):
    wikitext = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", exc_type=ImportError)
    assert detokenized(text) == wikitext.wikitext_detokenizer({"page": text})
    words = wikitext.process_results({"page": text}, (0.0,))["word_perplexity"][1]
    assert count_words(text) == words


@needs_real_data
def test_the_published_pages_are_those_of_the_raw_text():
    """62, found at the titles alone; and detokenized as lm-evaluation-harness does."""
    pages = wikitext2_pages(wikitext2_rows(REAL))
    name = "wikitext2_raw_test_pages.jsonl"
    assert pages == [row["page"] for row in read_rows(find(REAL, name), FIELDS[name])]
    wikitext = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", exc_type=ImportError)
    assert [detokenized(page) for page in pages] == [wikitext.wikitext_detokenizer({"page": page}) for page in pages]


def test_pages_begin_at_titles(tmp_path):
    pages = wikitext2_pages(wikitext2_rows(small_data(tmp_path)))
    assert [page.split("\n")[0] for page in pages] == [" = First Page = ", " = Second = ", " = Third Page = "]
    assert pages[1] == " = Second = \n \n Short . \n "


@pytest.mark.parametrize("heading", ["= = A = =", "= = = A = = =", "= A = =", "= A = = =", "= = A =", "A =", "= A"])
def test_other_headings_begin_no_page(heading):
    rows = ["", " = Title = \n", f" {heading} \n", " = Next = \n"]
    assert wikitext2_pages(rows) == [f" = Title = \n {heading} ", " = Next = \n"]


def test_rows_are_those_of_the_hub(tmp_path):
    """A line end stays with its text, and a blank line has none; text without a title is a page too."""
    for text in (" \n a \n \n b \n", " \n a \n \n b "):
        (tmp_path / "wikitext2_raw_test.txt").write_text(text)
        rows = wikitext2_rows(tmp_path)
        assert rows == ["", " a \n", "", " b \n"]
        assert wikitext2_stream(rows) == "\n\n a \n\n\n\n\n b \n"
        assert wikitext2_pages(rows) == [" \n a \n \n b \n"]


@MANY
@given(st.text(" ab\n\té", min_size=1, max_size=12))
def test_passages_are_cut_as_lm_eval_cuts_them(passage):
    """By its template, and by its way of encoding a pair."""
    models = pytest.importorskip("lm_eval.api.model", exc_type=ImportError)
    context, last = split_last_word(passage)
    assert context == " ".join(passage.split(" ")[:-1]) and last == f" {passage.split(' ')[-1]}"
    if not context.strip():
        return

    class Encoding(models.TemplateLM):
        eot_token_id = 256
        _loglikelihood_tokens = loglikelihood_rolling = generate_until = None

        def tok_encode(self, string, add_special_tokens=None, **kwargs):
            # Tokens of up to two letters, so that where a text is cut changes them.
            return [hash(piece) for piece in re.findall(r"\s|\S{1,2}", string)]

    class Ours:
        def encode_to_numpy(self, text, disallowed_special):
            import numpy

            return numpy.array([hash(piece) % 60_000 for piece in re.findall(r"\s|\S{1,2}", text)])

    given = encoded_pair(Ours(), context, last)
    expected = Encoding()._encode_pair(context, last)
    assert [ids.tolist() for ids in given] == [[token % 60_000 for token in ids] for ids in expected]


def test_a_literal_end_of_text_is_ordinary_text():
    context, last = encoded_pair(BYTES, "a <|endoftext|>", " b")
    assert bytes(context.tolist()) == b"a <|endoftext|>" and bytes(last.tolist()) == b" b"
