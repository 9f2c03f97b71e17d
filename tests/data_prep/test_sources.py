"""Files, units, shares and text files; the other kinds of sources have files of their own."""

import gzip
import io
import os
import pickle
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pytest
from reading import read, read_unit, source_of

from data_prep.sources import batches, grouping, text
from data_prep.sources.checked import Filters, is_blank, is_utf8, refusal
from data_prep.sources.find_files import find_files
from data_prep.sources.grouping import units_of
from data_prep.sources.source import DROPPED, WHOLE, File, Segment, Share, Unit, Unreadable
from megaresid.errors import UserError


def zstd(*frames):
    """Frames after one another, each by its own compressor."""
    result = b""
    for frame in frames:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(frame)
        result += sink.getvalue().to_pybytes()
    return result


def test_text_files_folders_and_patterns(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, content in (("b.txt", "B\r\n"), ("a.txt", "Ä"), ("sub/c.txt", "C"), ("x.md", "X"), ("empty.txt", "")):
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"D") + gzip.compress(b"DD"))
    (tmp_path / "e.txt.zst").write_bytes(zstd(b"E", b"EE"))
    assert read("text", tmp_path) == (["Ä", "B\r\n", "DDD", "EEE", "C"], {"empty": 1})
    assert read("text", tmp_path / "x.md", tmp_path / "*.txt", tmp_path / "a.txt")[0] == ["X", "Ä", "B\r\n"]
    assert read("text", tmp_path / "**" / "c*")[0] == ["C"]


def test_files_are_named_as_given_and_stamped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("four")
    status = Path("a.txt").stat()
    assert source_of("text", "a.txt").files == [File("a.txt", 4, str(status.st_mtime_ns))]
    assert source_of("text", ".").files[0].name == "a.txt"
    assert source_of("text", tmp_path).files[0].name == str(tmp_path / "a.txt")


def test_the_revision_is_the_hash_of_the_documents(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    described = source_of("text", tmp_path).describe("0123")
    assert described == {"kind": "text", "revision": "sha256:0123"}


@pytest.mark.parametrize(
    "kind, inputs, says",
    [
        ("text", [], "--source text needs at least one file"),
        ("text", ["nowhere"], "--input .*nowhere: no such file, folder or match"),
        ("text", ["*.none"], "no such file, folder or match"),
        ("jsonl", ["."], "no .jsonl or .jsonl.gz or .jsonl.zst or .* files in it"),
        ("parquet", ["."], "no .parquet files in it"),
        ("python-docs", ["a.txt"], "leave --input out"),
    ],
)
def test_inputs_that_give_nothing(tmp_path, kind, inputs, says):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=says):
        source_of(kind, *(tmp_path / name for name in inputs))


def test_text_that_is_left_out_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MOST_BYTES", 10)
    monkeypatch.setattr("data_prep.sources.checked.MOST_BYTES", 10)
    contents = {"a": b"good", "b": b"ab\xff", "c": b" \xe2\x80\x83\n", "d": b"x" * 10, "e": b"x" * 11, "f": b""}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(content))
    left_out = {"invalid_utf8": 1, "empty": 2, "too_long": 1}
    assert read("text", tmp_path / "*.txt") == (["good", "x" * 10], left_out)
    assert read("text", tmp_path / "*.gz") == (["good", "x" * 10], left_out)
    assert set(left_out) < set(DROPPED)


def test_a_text_file_that_is_too_long_is_not_read(tmp_path, monkeypatch):
    class NeverRead(io.BufferedReader):
        def read(self, *_):
            raise AssertionError("it was read")

    @contextmanager
    def never_read(path, name):
        with open(path, "rb", buffering=0) as file:
            yield NeverRead(file), file

    path = tmp_path / "sparse.txt"
    with open(path, "wb") as file:
        file.truncate(2**40)
    assert read("text", path) == ([], {"too_long": 1})
    monkeypatch.setattr(text, "open_stream", never_read)
    assert read("text", path) == ([], {"too_long": 1})


def test_unreadable_files_are_named(tmp_path):
    whole = gzip.compress(b"hello " * 1000)
    bad_gz = (whole[:-9], b"plain", whole[:20] + b"????" + whole[24:], whole + b"more")
    frames = zstd(b"hello " * 1000)
    bad_zst = (frames[:-3], b"plain", frames + b"more")
    for name, contents in (("bad.txt.gz", bad_gz), ("bad.txt.zst", bad_zst)):
        for content in contents:
            (tmp_path / name).write_bytes(content)
            with pytest.raises(Unreadable, match=f"{name}: cannot be read .*; get a good copy") as caught:
                read("text", tmp_path / name)
            assert "\n" not in str(caught.value)


def test_a_file_that_vanished_is_unreadable(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    opened = source_of("text", tmp_path)
    [unit] = opened.units()
    (tmp_path / "a.txt").unlink()
    with pytest.raises(Unreadable, match="a.txt: cannot be read .No such file or directory."):
        list(opened.reader.read(unit, Counter()))


def test_errors_of_workers_can_be_passed_on():
    error = Unreadable("a.gz", OSError("first\nsecond"))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is Unreadable and str(again) == str(error)
    assert str(error) == "a.gz: cannot be read (first); get a good copy, leave it out, or use --skip-unreadable"


def test_readers_and_units_can_be_passed_on(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    opened = source_of("text", tmp_path)
    [unit] = opened.units()
    reader, again = pickle.loads(pickle.dumps((opened.reader, unit)))
    assert again == unit and read_unit(reader, again, Counter()) == ["a"]


def cut_in_fives(file, path):
    for first in range(0, file.bytes, 5):
        last = min(first + 5, file.bytes)
        yield Segment(path, file.name, first, last), last - first


def units(sizes, share=WHOLE, fetched=None):
    files = [File(f"f{n}", size, "") for n, size in enumerate(sizes)]

    def fetch(file):
        if fetched is not None:
            fetched.append(file.name)
        return Path("here", file.name)

    return list(units_of(files, fetch, cut_in_fives, share))


def test_small_files_are_gathered_and_large_ones_cut(monkeypatch):
    monkeypatch.setattr(grouping, "UNIT_BYTES", 10)
    sizes = [3, 4, 5, 2, 12, 0, 9, 10, 0]
    made = units(sizes)

    def whole(*numbers):
        return tuple(Segment(Path("here", f"f{n}"), f"f{n}", 0, 0, sizes[n]) for n in numbers)

    def part(number, first, last):
        return (Segment(Path("here", f"f{number}"), f"f{number}", first, last, sizes[number]),)

    assert made == [
        Unit(0, 0, 0, 12, whole(0, 1, 2)),
        Unit(1, 0, 12, 2, whole(3)),
        Unit(2, 0, 14, 5, part(4, 0, 5)),
        Unit(2, 1, 19, 5, part(4, 5, 10)),
        Unit(2, 2, 24, 2, part(4, 10, 12)),
        Unit(3, 0, 26, 9, whole(5, 6)),
        Unit(4, 0, 35, 5, part(7, 0, 5)),
        Unit(4, 1, 40, 5, part(7, 5, 10)),
        Unit(5, 0, 45, 0, whole(8)),
    ]
    assert [unit.name for unit in made[:3]] == ["000000-000000", "000001-000000", "000002-000000"]
    assert sorted(unit.name for unit in made) == [unit.name for unit in made]


@pytest.mark.parametrize("sizes", [[3, 4, 5, 2, 12, 0, 9, 10, 0], [100], [0, 0], [1], [25, 0, 25], [10] * 7])
@pytest.mark.parametrize("of", [1, 2, 3, 7, 40])
def test_every_unit_is_of_one_share(monkeypatch, sizes, of):
    monkeypatch.setattr(grouping, "UNIT_BYTES", 10)
    whole, fetched = units(sizes), []
    total = sum(sizes)
    shares = [units(sizes, Share(number, of), fetched) for number in range(1, of + 1)]
    assert [unit for share in shares for unit in share] == whole
    for number, share in enumerate(shares):
        for unit in share:
            if unit.position < total:
                assert number * total <= unit.position * of < (number + 1) * total
    assert set(fetched) == {segment.name for unit in whole for segment in unit.segments}


def test_a_share_fetches_only_what_it_reads(monkeypatch):
    monkeypatch.setattr(grouping, "UNIT_BYTES", 10)
    for number, expected in ((1, ["f0", "f1"]), (2, ["f2", "f3"])):
        fetched = []
        units([20, 20, 20, 20], Share(number, 2), fetched)
        assert fetched == expected


def test_files_are_fetched_when_their_units_are_wanted(monkeypatch):
    monkeypatch.setattr(grouping, "UNIT_BYTES", 10)
    fetched = []

    def fetch(file):
        fetched.append(file.name)
        return Path(file.name)

    stream = units_of([File("a", 10, ""), File("b", 10, "")], fetch, cut_in_fives)
    for expected in (["a"], ["a"], ["a", "b"]):
        next(stream)
        assert fetched == expected


def test_shares_are_written_as_fractions():
    assert Share.parse("2/4") == Share(2, 4) and str(Share(2, 4)) == "2/4"
    for wrong in ("0/4", "5/4", "x", "", "1", "1/", "/2", "1/0", "-1/2", "1/2/3", "1.0/2", "1/10001"):
        with pytest.raises(UserError, match="--partition .*must be i/n"):
            Share.parse(wrong)


def test_white_space_is_what_python_says(monkeypatch):
    """Every character alone, and between white space on both sides of the places where long text is cut."""
    characters = [chr(n) for n in range(0x3100) if not 0xD800 <= n < 0xE000] + ["\ufeff", "🙂"]
    for character in characters:
        assert is_blank(character.encode()) == character.isspace()
    monkeypatch.setattr("data_prep.sources.checked.SLICE", 7)
    for character in ("x", "é", "\u2003", "\u3000", "🙂"):
        for before in (0, 1, 30, 62, 63, 64, 65, 70, 71):
            content = " " * before + character + "\u2003" * 9
            assert is_blank(content.encode()) == content.isspace()


def test_utf8_is_what_python_says(monkeypatch):
    monkeypatch.setattr("data_prep.sources.checked.SLICE", 4)
    good = ["é" * 9, "a" + "é" * 9, "🙂日本", "aaa🙂", ""]
    bad = [b"\xff", b"aaa\xc3", b"\xed\xa0\x80", b"\xc0\xafaaaa", b"aaaa\x80", b"aaaaaaa\xf0\x9f\x99", b"\xf8aaaaaa"]
    assert all(is_utf8(content.encode()) for content in good)
    assert not any(is_utf8(content) for content in bad)
    assert refusal(b"\xff") == "invalid_utf8" and refusal(b"a") is None and refusal(b"") == refusal(b"\n") == "empty"


def test_filters_by_definition():
    filters = Filters("en", 0.5, 3)
    good = {"language": "en", "language_score": 0.5, "score": 3.0}
    assert filters.reason(good) is None
    for change, reason in (
        ({"language": "de"}, "other_language"),
        ({"language": None}, "other_language"),
        ({"language": "de", "score": 0}, "other_language"),
        ({"language_score": 0.49}, "low_score"),
        ({"language_score": None}, "low_score"),
        ({"language_score": float("nan")}, "low_score"),
        ({"language_score": "1"}, "low_score"),
        ({"score": 2}, "low_score"),
    ):
        assert filters.reason(good | change) == reason
    assert filters.reason({"language": "en", "language_score": 1}) == "low_score"
    assert Filters().reason({}) is None and Filters(None, None, 0.0).reason({"score": 0}) is None


def test_batches_are_of_one_mebibyte_or_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_ROWS", 50)
    sizes = [2**19, 2**19, 1, 2**21, 5, 6] + [1] * 120
    for n, size in enumerate(sizes):
        (tmp_path / f"{n:04}.txt").write_bytes(b"x" * size)
    opened = source_of("text", tmp_path)
    [unit] = opened.units()
    made = list(opened.reader.read(unit, Counter()))
    found = [[len(document) for document in batch.documents] for batch in made]
    assert found == [[2**19, 2**19], [1], [2**21], [5, 6] + [1] * 48, [1] * 50, [1] * 22]
    assert [batch.position for batch in made[:3]] == [2**20, 2**20 + 1, 2**20 + 1 + 2**21]
    assert made[-1].position == unit.bytes == opened.bytes == sum(sizes)


def test_a_file_is_read_once_however_it_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    file = tmp_path / "a.txt"
    file.write_text("a")
    (tmp_path / "link.txt").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    spelled = ("a.txt", str(file), "below/../a.txt", "link.txt", "*.txt")
    assert [found.name for found in find_files(spelled, (".txt",))] == ["a.txt"]


def test_a_pattern_may_match_folders(tmp_path):
    for name in ("x/b.txt", "x/a.txt", "y.txt", "z/deep/c.txt", "z/other.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(tmp_path / name, name)
    found = [file.name for file in find_files((f"{tmp_path}/*",), (".txt",))]
    assert found == [str(tmp_path / name) for name in ("x/a.txt", "x/b.txt", "y.txt", "z/deep/c.txt")]


def test_a_change_since_the_listing_is_told(tmp_path):
    source = source_of("text", *(write_text(tmp_path / name, "text") for name in ("a.txt", "b.txt")))
    source.check_unchanged()
    [unit] = source.units()
    for segment in unit.segments:
        segment.check_size()
    status = (tmp_path / "b.txt").stat()
    os.utime(tmp_path / "b.txt", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UserError, match="b.txt: changed while the job read it"):
        source.check_unchanged()
    for found in ("tex", "texts"):
        (tmp_path / "b.txt").write_text(found)
        with pytest.raises(Unreadable, match=f"b.txt: cannot be read .{len(found)} bytes, and 4 when it was listed"):
            unit.segments[1].check_size()


def write_text(path, text):
    path.write_text(text)
    return path
