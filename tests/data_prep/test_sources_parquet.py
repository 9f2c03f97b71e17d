import io
import random
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet as pq
from reading import read, read_unit, source_of

from data_prep.sources import batches, parquet
from data_prep.sources.checked import Filters
from data_prep.sources.pages import page_sizes
from data_prep.sources.parquet import ParquetReader, rows_at_once, texts_of
from data_prep.sources.source import Segment, Share, Tally, Unit, Unreadable
from megaresid.errors import UserError


def write(path, rows, **options):
    pq.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def fineweb(count, seed=0):
    """Rows with FineWeb's columns."""
    rng = random.Random(seed)
    for n in range(count):
        yield {
            "text": " ".join(rng.choices(["the", "naïve", "日本", "🙂", "cat"], k=rng.randrange(1, 60))) + f" {n}",
            "id": f"<urn:uuid:{n}>",
            "dump": "CC-MAIN-2013-20",
            "url": f"http://example.com/{n}",
            "date": "2013-05-18T07:24:47Z",
            "file_path": "s3://commoncrawl/x.warc.gz",
            "language": rng.choice(["en", "en", "de", None]),
            "language_score": rng.choice([0.3, 0.65, 0.9, None]),
            "token_count": n,
        }


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("rows_of_group", [700, 10**6])
def test_rows_are_documents_in_order(tmp_path, compression, rows_of_group):
    rows = list(fineweb(2000))
    path = write(tmp_path / "a.parquet", rows, row_group_size=rows_of_group, compression=compression)
    assert read("parquet", path) == ([row["text"] for row in rows], {})
    named = [row["url"] for row in rows]
    assert read("parquet", tmp_path, text_column="url") == (named, {})


TYPES = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.binary(),
    pyarrow.large_binary(),
    pyarrow.string_view(),
    pyarrow.binary_view(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
]
VALUES = ["one", None, "", "é🙂", " \u2003", "two", "one", "x" * 50]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_types_of_text(tmp_path, kind):
    column = pyarrow.array(VALUES)
    column = column.dictionary_encode() if pyarrow.types.is_dictionary(kind) else column.cast(kind)
    pq.write_table(pyarrow.table({"n": range(8), "text": column}), tmp_path / "a.parquet", row_group_size=5)
    assert read("parquet", tmp_path) == (["one", "é🙂", "two", "one", "x" * 50], {"empty": 3})


@pytest.mark.parametrize("kind", TYPES[:4], ids=str)
def test_texts_of_a_slice(kind):
    column = pyarrow.array(VALUES).cast(kind)
    expected = [(value or "").encode() for value in VALUES]
    for start in range(9):
        for stop in range(start, 9):
            assert list(texts_of(column[start:stop])) == expected[start:stop]
    # A null may stand over bytes.
    masked = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [pyarrow.py_buffer(b"\x02"), pyarrow.array([0, 3, 5], pyarrow.int32()).buffers()[1],
                              pyarrow.py_buffer(b"hidok")])  # fmt: skip
    assert list(texts_of(masked)) == [b"", b"ok"]


def test_invalid_utf8_and_long_text_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "MOST_BYTES", 10)
    monkeypatch.setattr("data_prep.sources.checked.MOST_BYTES", 10)
    values = [b"good", b"\xff", b"x" * 10, b"x" * 11, b"\xff" * 11, b"\xc3", b"\xa9", b"end"]
    for kind in (pyarrow.binary(), pyarrow.string()):
        column = pyarrow.array(values, pyarrow.binary()).view(kind)
        pq.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        left_out = {"invalid_utf8": 3, "too_long": 2}
        assert read("parquet", tmp_path) == (["good", "x" * 10, "end"], left_out)


def test_mostly_invalid_text_is_an_error(tmp_path):
    pq.write_table(pyarrow.table({"text": pyarrow.array([b"\xff"] * 10 + [b"a"] * 9)}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: 10 of 19 rows are bad \(0 without text in the column, 10 not"):
        read("parquet", tmp_path)


def test_wrong_columns_are_named(tmp_path):
    path = write(tmp_path / "a.parquet", [{"id": 1, "words": ["a"], "flag": True}])
    with pytest.raises(UserError, match=r"a.parquet: no column 'text' \(it has id, words, flag\); name the text's by"):
        read("parquet", path)
    for column, found in (("id", "int64"), ("words", "list<.*>"), ("flag", "bool")):
        with pytest.raises(UserError, match=f"column '{column}': {found} where text is expected"):
            read("parquet", path, text_column=column)
    path = write(tmp_path / "a.parquet", [{"text": "a"}])
    with pytest.raises(UserError, match=r"no column 'score' \(it has text\); leave --minimum-score out"):
        read("parquet", path, minimum_score=3)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pq.write_table(twice, path)
    with pytest.raises(UserError, match="more than one column 'text'"):
        read("parquet", path)


@pytest.mark.parametrize("options", [(None, None, None), ("en", None, None), (None, 0.65, None), ("en", 0.65, 2)])
def test_filters_by_definition(tmp_path, options):
    rows = [row | {"score": n % 5, "int_score": 1} for n, row in enumerate(fineweb(900))]
    path = write(tmp_path / "a.parquet", rows, row_group_size=400)
    language, language_score, score = options
    kept, dropped = [], Counter()
    for row in rows:
        if language is not None and row["language"] != language:
            dropped["other_language"] += 1
        elif language_score is not None and (row["language_score"] is None or row["language_score"] < language_score):
            dropped["low_score"] += 1
        elif score is not None and row["score"] < score:
            dropped["low_score"] += 1
        else:
            kept.append(row["text"])
    named = dict(language=language, minimum_language_score=language_score, minimum_score=score)
    assert read("parquet", path, **named) == (kept, dict(dropped))
    assert options == (None, None, None) or 0 < len(kept) < 700


def test_filters_may_leave_nothing(tmp_path):
    path = write(tmp_path / "a.parquet", list(fineweb(900)))
    assert read("parquet", path, language="fr") == ([], {"other_language": 900})


def test_a_text_column_may_be_a_filters_too(tmp_path):
    write(tmp_path / "a.parquet", [{"language": "en"}, {"language": "de"}])
    assert read("parquet", tmp_path, text_column="language", language="en") == (["en"], {"other_language": 1})


def column_bytes(path, column):
    """The uncompressed bytes of a column by row group, as the footer has them."""
    metadata = pq.read_metadata(path)
    leaf = metadata.schema.names.index(column)
    return [metadata.row_group(n).column(leaf).total_uncompressed_size for n in range(metadata.num_row_groups)]


def test_a_large_file_is_cut_at_row_groups(tmp_path, monkeypatch):
    rows = list(fineweb(3000))
    path = write(tmp_path / "a.parquet", rows, row_group_size=100)
    sizes, limit = column_bytes(path, "text"), 50_000
    monkeypatch.setattr(parquet, "UNIT_BYTES", limit)
    monkeypatch.setattr("data_prep.sources.grouping.UNIT_BYTES", limit)
    source = source_of("parquet", path)
    units = list(source.units())
    assert len(units) > 5 and [unit.index for unit in units] == list(range(len(units)))
    ends = []
    for first, size in enumerate(sizes):
        if first == 0 or sum(sizes[ends[-1] if ends else 0 : first]) >= limit:
            ends += [first] if first else []
    bounds = [0, *ends, len(sizes)]
    assert [unit.segments for unit in units] == [
        (Segment(path, str(path), first, last, source.bytes),) for first, last in zip(bounds, bounds[1:], strict=False)
    ]
    positions = [source.bytes * sum(sizes[:first]) // sum(sizes) for first in bounds[:-1]]
    assert [unit.position for unit in units] == positions
    assert sum(unit.bytes for unit in units) == source.bytes == path.stat().st_size
    dropped = Counter()
    parts = [read_unit(source.reader, unit, dropped) for unit in reversed(units)]
    assert [text for part in reversed(parts) for text in part] == [row["text"] for row in rows] and not dropped
    shares = [list(source.units(Share(number, 3))) for number in (1, 2, 3)]
    assert [unit for share in shares for unit in share] == units and all(shares)


def test_files_without_rows_or_text(tmp_path, monkeypatch):
    schema = pyarrow.schema({"text": pyarrow.string()})
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    pq.write_table(pyarrow.table({"text": pyarrow.array([None, None], pyarrow.string())}), tmp_path / "b.parquet")
    for limit in (2**25, 1):
        monkeypatch.setattr(parquet, "UNIT_BYTES", limit)
        monkeypatch.setattr("data_prep.sources.grouping.UNIT_BYTES", limit)
        assert read("parquet", tmp_path) == ([], {"empty": 2})


def test_batches_have_about_as_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH_BYTES", 2000)
    monkeypatch.setattr(batches, "BATCH_BYTES", 2000)
    rows = [{"text": f"{n:03}" + "x" * random.Random(n).randrange(200)} for n in range(500)]
    source = source_of("parquet", write(tmp_path / "a.parquet", rows, use_dictionary=False))
    [unit] = source.units()
    found = list(source.reader.read(unit, Tally()))
    assert [text.decode() for batch in found for text in batch.documents] == [row["text"] for row in rows]
    assert all(1500 < sum(map(len, batch.documents)) <= 2000 for batch in found[:-1])
    assert found[-1].position == unit.bytes and len({batch.position for batch in found}) > len(found) // 2


def pages_of(path):
    chunk = pq.read_metadata(path).row_group(0).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    with open(path, "rb") as file:
        return list(page_sizes(file, start, start + chunk.total_compressed_size))


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("checksum", [False, True])
def test_sizes_of_pages(tmp_path, compression, version, checksum):
    """A plain page of a column without nulls is each value after the four bytes of its length."""
    path, options = tmp_path / "a.parquet", dict(compression=compression, write_page_checksum=checksum)
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), nullable=False)])
    values = [chr(97 + n % 26) * (n % 50) for n in range(1000)]
    table = pyarrow.table({"text": values}, schema=schema)
    options |= dict(data_page_version=version, write_batch_size=100, data_page_size=1, write_page_index=checksum)
    pq.write_table(table, path, use_dictionary=False, **options)
    hundreds = [values[start : start + 100] for start in range(0, 1000, 100)]
    assert pages_of(path) == [sum(4 + len(value) for value in hundred) for hundred in hundreds]
    pq.write_table(pyarrow.table({"text": ["abc", "de"] * 500}, schema=schema), path, **options)
    dictionary, *others = pages_of(path)
    assert dictionary == 4 + 3 + 4 + 2 and len(others) == 10


def test_headers_of_pages_by_hand():
    """Fields of all types of the compact protocol, some by long ids, around the two that count."""
    fields = [
        "15 06",  # 1: i32 3
        "15 d00f",  # 2: i32 1000, the uncompressed size
        "15 14",  # 3: i32 10, the size as stored
        "18 03 616263",  # 4: binary abc
        "1c 15ff01 15d80f 11 00",  # 5: a struct of two i32 and a true
        "19 25 02 04",  # 6: a list of two i32
        "1a f1 10 01020102010201020102010201020000",  # 7: a set of sixteen booleans
        "1b 02 58 02 01 78 04 00",  # 8: a map of two, i32 to binary
        "1b 00",  # 9: an empty map
        "17 15d80f15d80f15d8",  # 10: double
        "13 7f",  # 11: i8
        "1d 15d80f15d80f15d80f15d80f15d80f15",  # 12: uuid
        "04 a001 0a",  # 80, by its own id: i16
        "00",
    ]
    head = bytes.fromhex("".join(fields))
    data = head + bytes(10) + bytes.fromhex("1500" "1508" "1500" "00")
    assert list(page_sizes(io.BytesIO(b"PAR1" + data), 4, 4 + len(data))) == [1000, 4]


@pytest.mark.parametrize(
    "data",
    [b"", b"\x15", b"\x00", b"\x15\x00\x00", b"\x1c" * 10**5, b"\x15" + b"\xff" * 12, b"\x1f\x00", b"\x19\xff" * 50],
)
def test_damaged_headers_of_pages(data):
    with pytest.raises(OSError, match="header of a page is"):
        list(page_sizes(io.BytesIO(data), 0, 1000))


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_page_larger_than_memory_is_unreadable(tmp_path, monkeypatch, dictionary):
    path = write(tmp_path / "a.parquet", [{"text": "x" * 500}, {"text": "y" * 500}], use_dictionary=dictionary)
    monkeypatch.setattr(parquet, "SMALL_BYTES", 100)
    monkeypatch.setattr(parquet, "MOST_AT_ONCE", 1000)
    monkeypatch.setattr(parquet, "MOST_PAGE_BYTES", 1100)
    assert read("parquet", path)[0] == ["x" * 500, "y" * 500]
    monkeypatch.setattr(parquet, "MOST_PAGE_BYTES", 1000)
    with pytest.raises(Unreadable, match="a.parquet: cannot be read .a page of 1,0.. bytes, too large"):
        read("parquet", path)


def test_rows_at_once_are_bounded_by_the_largest_page(tmp_path, monkeypatch):
    """Many rows can be one long entry of the dictionary, which the mean of their sizes does not show."""
    path = write(tmp_path / "a.parquet", [{"text": "x" * 1000}] * 400, write_statistics=False)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    assert chunk.total_uncompressed_size < 1100
    monkeypatch.setattr(parquet, "MOST_AT_ONCE", 10_040)
    for small in (0, 10**6):
        monkeypatch.setattr(parquet, "SMALL_BYTES", small)
        assert rows_at_once(chunk, path) in (9, 10)
        assert read("parquet", path)[0] == ["x" * 1000] * 400
    monkeypatch.setattr(parquet, "MOST_AT_ONCE", 500)
    assert rows_at_once(chunk, path) == 1


@pytest.mark.parametrize("repeated", [0, 1])
def test_a_dictionary_without_repetition_does_not_bound_the_rows(tmp_path, monkeypatch, repeated):
    """Its values together are no longer than they are stored, unless one comes twice."""
    values = [f"{n:01000d}" for n in range(40 - repeated)]
    values += values[:repeated]
    path = write(tmp_path / "a.parquet", [{"text": value} for value in values], write_statistics=False)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    monkeypatch.setattr(parquet, "SMALL_BYTES", 1000)
    monkeypatch.setattr(parquet, "MOST_AT_ONCE", 50_000)
    # One page, the dictionary, of 1004 bytes a value.
    rows = rows_at_once(chunk, path)
    assert rows == 1 if repeated else rows >= 40
    assert read("parquet", path)[0] == values
    monkeypatch.setattr(parquet, "MOST_AT_ONCE", 40_000)
    assert rows_at_once(chunk, path) == 1, "all together are too long"


def test_positions_of_several_files(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.parquet", [{"text": "x" * 2**19}] * 4, use_dictionary=False)
    source = source_of("parquet", tmp_path)
    [unit] = source.units()
    size = source.files[0].bytes
    positions = [batch.position for batch in source.reader.read(unit, Tally())]
    assert positions == [size * rows // 4 + size * file for file in range(3) for rows in (2, 4)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "whole.parquet", list(fineweb(1000)), write_page_checksum=True)


def test_damaged_files_are_unreadable(tmp_path, whole, monkeypatch):
    data = whole.read_bytes()
    footer = int.from_bytes(data[-8:-4], "little")
    damaged = {
        "short": data[: len(data) // 2],
        "not": b"PAR1 no",
        "empty": b"",
        "json": b'{"text": "x"}\n' * 100,
        "footer": data[: -8 - footer] + bytes(100) + data[-8 - footer + 100 :],
        "page": data[:2000] + bytes([data[2000] ^ 255]) + data[2001:],
    }
    for limit in (2**25, 1):
        monkeypatch.setattr("data_prep.sources.grouping.UNIT_BYTES", limit)
        for name, content in damaged.items():
            path = tmp_path / f"{name}.parquet"
            path.write_bytes(content)
            source = source_of("parquet", path)
            [unit] = source.units()
            with pytest.raises(Unreadable, match=f"{name}.parquet: cannot be read") as caught:
                list(source.reader.read(unit, Tally()))
            assert "\n" not in str(caught.value)


def test_a_file_that_could_not_be_cut_is_not_read_whole(tmp_path, whole, monkeypatch):
    """Its units would be others the next time."""
    monkeypatch.setattr("data_prep.sources.grouping.UNIT_BYTES", 1)
    path = tmp_path / "a.parquet"
    path.write_bytes(whole.read_bytes()[:-1] + b"?")
    source = source_of("parquet", path)
    [unit] = source.units()
    path.write_bytes(whole.read_bytes())
    with pytest.raises(Unreadable, match="a.parquet: cannot be read .its footer could not be read before"):
        list(source.reader.read(unit, Tally()))


def test_every_flipped_byte_is_seen_or_harmless(tmp_path, whole):
    """Pages have checksums here: no damage to them may pass as other text."""
    data, expected = bytearray(whole.read_bytes()), [row["text"] for row in fineweb(1000)]
    path, rng, seen = tmp_path / "a.parquet", random.Random(0), 0
    for _ in range(60):
        place = rng.randrange(len(data) - 4000)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            assert read("parquet", path) == (expected, {})
        except UserError:
            seen += 1
        data[:] = whole.read_bytes()
    assert seen > 5


def test_a_file_with_other_rows_than_its_footer_says_is_unreadable(tmp_path, whole, monkeypatch):
    def without_the_first(self, table, path, groups):
        yield from table.read_row_group(0).slice(1).to_batches()

    monkeypatch.setattr(ParquetReader, "_batches", without_the_first)
    with pytest.raises(Unreadable, match="999 rows where its footer says 1000"):
        read("parquet", whole)


def test_a_vanished_file_is_unreadable(tmp_path):
    unit = Unit(0, 0, 0, 5, (Segment(tmp_path / "a.parquet", "a.parquet"),))
    with pytest.raises(Unreadable, match="a.parquet: cannot be read .No such file or directory."):
        list(ParquetReader("text", Filters()).read(unit, Tally()))
