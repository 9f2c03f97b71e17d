import gzip
import itertools
import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import read, read_unit, source_of
from test_sources import zstd

from data_prep.sources import jsonl
from data_prep.sources.long_line import OTHER, fields
from data_prep.sources.source import Segment, Tally, Unit, Unreadable
from megaresid.errors import UserError

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def write(path, *rows):
    """Rows are values to be written as JSON, or lines as they are."""
    data = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(COMPRESS[path.suffix if path.suffix in COMPRESS else ""](data))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "a.ndjson.gz", "a.json.gz"])
def test_rows_are_documents_in_order(tmp_path, name):
    rows = [{"id": 1, "body": "one\n"}, {"id": 2, "body": None}, {"id": 3, "body": "🙂"}, {"body": " \t"}]
    more = [{"body": f"text {n}"} for n in range(2000)]
    write(tmp_path / name, *rows, *more)
    expected = ["one\n", "🙂"] + [row["body"] for row in more]
    assert read("jsonl", tmp_path, text_column="body") == (expected, {"empty": 2})


def test_several_members_and_frames_are_one_file(tmp_path):
    rows = [b'{"text": "a', b'bc"}\n{"text": "d"}\n{"te', b'xt": "e"}']
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, rows)))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd(*rows))
    assert read("jsonl", tmp_path) == (["abc", "d", "e"] * 2, {})


def test_blank_lines_carriage_returns_and_a_byte_order_mark(tmp_path):
    write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \n{"text": "b\\r\\n"}\r\n\n{"text": "c"}')
    assert read("jsonl", tmp_path) == (["a", "b\r\n", "c"], {})


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    lines = [
        rb"a\ud800b \ud83d\ude42",
        rb"\\ud800 \\\ud800 \\\\ud83d",
        rb"\ud83d\ud83d\ude42\ude42",
        rb"\uD83D\uDE42\uDFFFx",
        rb"\udc00\u00e9\ud83dx",
    ]
    write(tmp_path / "a.jsonl", *(b'{"text": "%s"}\n' % line for line in lines))
    # By Python's own reader of JSON, whose half pairs UTF-16 replaces.
    expected = [
        json.loads(b'"%s"' % line).encode("utf-16", "surrogatepass").decode("utf-16", "replace") for line in lines
    ]
    assert read("jsonl", tmp_path) == (expected, {})
    assert expected[0] == "a\ufffdb 🙂" and "\\ud800 \\\ufffd" in expected[1]


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "bad_rows"),
        (b"[1]", "bad_rows"),
        (b"null", "bad_rows"),
        (b'"text"', "bad_rows"),
        (b'{"content": "x"}', "bad_rows"),
        (b'{"text": 5}', "bad_rows"),
        (b'{"text": ["x"]}', "bad_rows"),
        (b'{"text": "x"} {}', "bad_rows"),
        (b'{"text": "x\x01"}', "bad_rows"),
        (b'{"text": "x", "n": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "bad_rows"),
        (b'{"text": "x", "n": ' + b"9" * 10**5 + b"}", "bad_rows"),
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b'{"text": "\xed\xa0\x80"}', "invalid_utf8"),
        (b'{"text": "x", "url": "\xff"}', "invalid_utf8"),
        (b'{"text": null}', "empty"),
        (b'{"text": "\\u2003\\n"}', "empty"),
    ],
)
def test_bad_rows_are_counted_and_the_others_read(tmp_path, line, reason):
    write(tmp_path / "a.jsonl", {"text": "before"}, line + b"\n", {"text": "after"})
    assert read("jsonl", tmp_path) == (["before", "after"], {reason: 1})
    # As the first line too, where it does not look like another format or a wrong option.
    if reason != "bad_rows" or line in (b"{", b'{"text": "x"} {}'):
        write(tmp_path / "a.jsonl", line + b"\n", {"text": "after"})
        assert read("jsonl", tmp_path) == (["after"], {reason: 1})


@pytest.mark.parametrize(
    "first, says",
    [
        (b'{"content": "x", "id": 1}', r"no column 'text' \(it has content, id\); name the text's by --text-column"),
        (b'{"text": 5}', "column 'text': int where text is expected; name the text's by --text-column"),
        (b"[1]", "its first line is list, not an object; check --source"),
        (b'not JSON\n{"content": "x"}', r"no column 'text' \(it has content\)"),
    ],
)
def test_a_wrong_first_row_is_a_wrong_option(tmp_path, first, says):
    path = write(tmp_path / "a.jsonl", first + b"\n", {"text": "good"})
    with pytest.raises(UserError, match=says) as caught:
        read("jsonl", path)
    assert str(caught.value).startswith(f"{path}: ") and not isinstance(caught.value, Unreadable)


@pytest.mark.parametrize("bad, good, refused", [(9, 0, False), (10, 9, True), (10, 10, False), (300, 299, True)])
def test_more_bad_rows_than_good_ones_are_an_error(tmp_path, bad, good, refused):
    rows = [b"{\n" if n % 2 else b'{"text": "\xff"}\n' for n in range(bad)] + [{"text": "good"}] * good
    random.Random(0).shuffle(rows)
    path = write(tmp_path / "a.jsonl", *rows)
    if refused:
        with pytest.raises(UserError, match=rf"a.jsonl: {bad} of {bad + good} rows are bad"):
            read("jsonl", path)
    else:
        left_out = Counter(bad_rows=bad // 2, invalid_utf8=(bad + 1) // 2)
        assert read("jsonl", path) == (["good"] * good, dict(left_out))


def test_filters(tmp_path):
    rows = [
        {"text": "a", "language": "en", "language_score": 0.9},
        {"text": "b", "language": "de", "language_score": 0.9},
        {"text": "c", "language": "en", "language_score": 0.1},
        {"text": None, "language": "en", "language_score": 0.1},
        {"text": "d", "language": None, "language_score": 1},
        {"text": "e", "language": "en"},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    left_out = {"other_language": 2, "low_score": 3}
    assert read("jsonl", path, language="en", minimum_language_score=0.5) == (["a"], left_out)
    with pytest.raises(UserError, match=r"no column 'score' \(it has text, .*\); leave --minimum-score out"):
        read("jsonl", path, minimum_score=3)


def cut_documents(path):
    """Documents and what was left out, with each unit read on its own, in reverse."""
    source = source_of("jsonl", path)
    parts, dropped = [], Counter()
    for unit in reversed(list(source.units())):
        parts.append(read_unit(source.reader, unit, dropped))
    return [document for part in reversed(parts) for document in part], dict(dropped)


@pytest.mark.parametrize("unit_bytes", [1, 2, 7, 16, 17, 18, 19, 20, 34, 37, 51, 1000])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_line_is_of_one_unit(tmp_path, monkeypatch, unit_bytes, mark):
    monkeypatch.setattr(jsonl, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr("data_prep.sources.grouping.UNIT_BYTES", unit_bytes)
    # Lines of 17 bytes first, so that some cuts fall between lines; then others, blank ones and one without an end.
    rows = [f"doc{n:02}" for n in range(4)] + ["", "x" * 40, "ééé", "y"]
    data = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in rows).replace("é\"}", "é\"}\n\n")
    path = write(tmp_path / "a.jsonl", (mark + data).encode())
    assert data.split("\n")[0] + "\n" == '{"text": "doc00"}\n' and len(data.split("\n")[0]) == 17
    sizes = [unit.bytes for unit in source_of("jsonl", path).units()]
    size = path.stat().st_size
    assert sum(sizes) == size and len(sizes) == math.ceil(size / unit_bytes)
    assert cut_documents(path) == ([text for text in rows if text], {"empty": 1})


def test_only_the_first_row_of_a_file_shows_a_wrong_option(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "UNIT_BYTES", 16)
    monkeypatch.setattr("data_prep.sources.grouping.UNIT_BYTES", 16)
    path = write(tmp_path / "a.jsonl", {"text": "first"}, {"content": "second"}, [3], {"text": 4}, {"text": "fifth"})
    assert cut_documents(path) == (["first", "fifth"], {"bad_rows": 3})


@pytest.mark.parametrize("suffix", COMPRESS)
def test_positions_end_with_the_unit(tmp_path, suffix):
    for name in "abc":
        write(tmp_path / f"{name}.jsonl{suffix}", *({"text": f"{random.Random(n).random()}"} for n in range(900)))
    source = source_of("jsonl", tmp_path)
    [unit] = source.units()
    positions = [batch.position for batch in source.reader.read(unit, Tally())]
    # A row is read with what the buffer took of the file; at the end that is all, but for some checksum.
    assert unit.bytes - 16 <= positions[-1] <= unit.bytes and positions == sorted(positions)
    assert len(set(positions)) >= 3


def test_compressed_files_are_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "UNIT_BYTES", 5)
    monkeypatch.setattr("data_prep.sources.grouping.UNIT_BYTES", 5)
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        path = write(tmp_path / name, {"text": "a"}, {"text": "b"})
        [unit] = source_of("jsonl", path).units()
        size = path.stat().st_size
        assert unit.segments == (Segment(path, str(path), 0, 0, size),) and unit.bytes == size
        assert cut_documents(path) == (["a", "b"], {})


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("unit_bytes", [10, 64, 10**6])
def test_lines_that_are_too_long_are_skipped(tmp_path, monkeypatch, suffix, unit_bytes):
    monkeypatch.setattr(jsonl, "MOST_BYTES", 64)
    monkeypatch.setattr(jsonl, "SKIP_BYTES", 8)
    monkeypatch.setattr(jsonl, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr("data_prep.sources.grouping.UNIT_BYTES", unit_bytes)
    most = 64 - len('{"text": ""}')
    texts = ["a", "b" * (most + 1), "c" * most, "d" * 500, "e"]
    path = write(tmp_path / f"a.jsonl{suffix}", *({"text": text} for text in texts), b'{"text": "' + b"x" * 99)
    assert cut_documents(path) == (["a", "c" * most, "e"], {"too_long": 3})


def test_a_line_without_an_end_is_not_read_again_by_every_unit(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "MOST_BYTES", 1000)
    monkeypatch.setattr(jsonl, "SKIP_BYTES", 100)
    path = write(tmp_path / "a.jsonl", {"text": "a"}, b"x" * 10**5)
    for first, dropped in ((0, {"too_long": 1}), (5000, {}), (90_000, {})):
        with open(path, "rb") as stream:
            found = list(jsonl.lines(stream, Segment(path, "a", first, first + 2000)))
            assert stream.tell() <= first + 2000 + 100
        assert Counter(too_long=found.count(None)) == Counter(dropped)


def test_a_file_that_became_shorter_is_unreadable(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    reader = source_of("jsonl", path).reader
    unit = Unit(0, 0, 0, 100, (Segment(path, "a.jsonl", 0, 100),))
    with pytest.raises(Unreadable, match="a.jsonl: cannot be read .shorter than when it was listed."):
        list(reader.read(unit, Tally()))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_cut_short_is_unreadable(tmp_path, suffix):
    rows = [{"text": f"{random.Random(n).random()}"} for n in range(1000)]
    path = write(tmp_path / f"a.jsonl{suffix}", *rows)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(Unreadable, match="a.jsonl.*cannot be read"):
        read("jsonl", path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('ab"\\é🙂\n{}[],:\x7f\u2028\x00 '),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text('te"x', max_size=3), below, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.tuples(st.sampled_from(["text", "id", "é", 'x"y']), VALUES), max_size=5)


@settings(deadline=None, max_examples=150)
@given(row=ROWS, ascii=st.booleans(), separators=st.sampled_from([(",", ":"), (" ,\t", " : ")]))
def test_long_lines_are_read_as_short_ones(row, ascii, separators):
    comma, colon = separators
    members = [colon.join(json.dumps(each, ensure_ascii=ascii) for each in member) for member in row]
    line = (" {" + comma.join(members) + "} \n").encode()
    expected = {}
    for key, value in json.loads(line).items():
        if key == "text" and isinstance(value, str):
            expected[key] = value.encode()
        elif key in ("text", "é"):
            expected[key] = OTHER if isinstance(value, dict | list) else value
    assert fields(line, "text", ["é"], jsonl.parse) == expected


@pytest.mark.parametrize("text", ["é" * 550_000, "a🙂" * 5000, "\\" * 9000, '"\\n' * 3000, "\u0001" * 3000])
@pytest.mark.parametrize("ascii", [True, False])
def test_long_text_is_parsed_in_parts(text, ascii):
    for shift in range(4):
        whole = "x" * shift + text
        line = json.dumps({"text": whole}, ensure_ascii=ascii).encode()
        assert fields(line, "text", [], jsonl.parse) == {"text": whole.encode()}


def test_long_values_of_other_fields_are_not_made():
    line = json.dumps({"language": "x" * 5000, "text": "y" * 5000, "z" * 5000: 1}).encode()
    assert fields(line, "text", ["language", "z" * 5000], jsonl.parse) == {"language": OTHER, "text": b"y" * 5000}


def test_rows_of_long_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONG_BYTES", 2)
    lines = [
        (b'{"id": 1, "text": "a", "language": "en"}', "a"),
        (b'{"text": "\\ud800b", "language": "en"}', "\ufffdb"),
        (b'{"text": "c", "language": "de"}', "other_language"),
        (b'{"text": "c", "language": ["en"]}', "other_language"),
        (b'{"text": null, "language": "en"}', "empty"),
        (b'{"text": "\\n", "language": "en"}', "empty"),
        (b'{"text": "\xff", "language": "en"}', "invalid_utf8"),
        (b'{"text": 5, "language": "en"}', "bad_rows"),
        (b'{"text": {"text": "x"}, "language": "en"}', "bad_rows"),
        (b'{"url": "x", "language": "en"}', "bad_rows"),
        (b'{"text": "x\x01", "language": "en"}', "bad_rows"),
        (b'{"text": "x\\u12", "language": "en"}', "bad_rows"),
        (b'{"text": "x", "language": "en"', "bad_rows"),
        (b'{"text": "x", "o": [1, "language": "en"', "bad_rows"),
        (b'{"text" "x"}', "bad_rows"),
        (b'{text: "x"}', "bad_rows"),
        (b'{"text": "x",}', "bad_rows"),
        (b'{"text": }', "bad_rows"),
        (b'["text", "x"]', "bad_rows"),
        (b'"text"', "bad_rows"),
        (b"{}", "bad_rows"),
    ]
    reasons = Counter(result for _, result in lines if "_" in result or result == "empty")
    good = [result for _, result in lines if result not in reasons]
    rows = [line + b"\n" for line, _ in lines] + [b'{"text": "good", "language": "en"}\n'] * 30
    path = write(tmp_path / "a.jsonl", *rows)
    assert read("jsonl", path, language="en") == (good + ["good"] * 30, dict(reasons))


def test_line_lengths_do_not_change_documents(tmp_path, monkeypatch):
    """The same file with lines on both sides of the limit for long ones."""
    rng = random.Random(0)
    rows = [{"id": n, "text": "".join(rng.choices('aé🙂"\\\n ', k=rng.randrange(1, 300)))} for n in range(300)]
    path = write(tmp_path / "a.jsonl", *rows)
    expected = [row["text"] for row in rows if not row["text"].isspace()]
    for limit in itertools.chain([2], range(100, 2000, 300)):
        monkeypatch.setattr(jsonl, "LONG_BYTES", limit)
        assert read("jsonl", path)[0] == expected
