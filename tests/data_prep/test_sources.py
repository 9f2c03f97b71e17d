import ast
import gzip
import inspect
import json
import json.decoder
import pydoc_data.topics
import textwrap

import pyarrow
import pytest
from pyarrow import parquet

from data_prep.sources import PythonDocs, docstrings, open_source
from megaresid.errors import UserError


def texts(kind, *inputs, column="text"):
    return [text for text, _ in open_source(kind, tuple(str(path) for path in inputs), column).documents()]


def write_jsonl(path, rows):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path, rows, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_text_files_folders_and_patterns(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", "B\r\n"), ("a.txt", "Ä"), ("sub/c.txt", "C"), ("x.md", "X"), ("empty.txt", "")):
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"D"))
    assert texts("text", tmp_path) == ["Ä", "B\r\n", "D", "", "C"]
    assert texts("text", tmp_path / "x.md", tmp_path / "*.txt", tmp_path / "a.txt") == ["X", "Ä", "B\r\n", ""]
    assert texts("text", tmp_path / "**" / "c*") == ["C"]


def test_positions_end_at_the_size_of_all_files(tmp_path):
    rows = [{"text": f"document {n}"} for n in range(3000)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl.gz", rows)
    write_parquet(tmp_path / "c.parquet", rows)
    for kind, files in (("jsonl", ["a.jsonl", "b.jsonl.gz"]), ("parquet", ["c.parquet"]), ("text", ["a.jsonl"])):
        source = open_source(kind, tuple(str(tmp_path / file) for file in files), "text")
        positions = [position for _, position in source.documents()]
        assert positions == sorted(positions) and positions[0] >= 0
        assert positions[-1] == source.bytes == sum((tmp_path / file).stat().st_size for file in files)


def test_rows_of_jsonl_and_parquet(tmp_path):
    rows = [{"id": 1, "body": "one\n"}, {"id": 2, "body": None}, {"id": 3, "body": "🙂"}]
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert texts("jsonl", write_jsonl(tmp_path / name, rows), column="body") == ["one\n", "", "🙂"]
    many = [{"id": n, "body": f"text {n}"} for n in range(5000)]
    path = write_parquet(tmp_path / "a.parquet", rows + many, row_group_size=700)
    assert texts("parquet", path, column="body") == ["one\n", "", "🙂"] + [row["body"] for row in many]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude42"}\n\n')
    assert texts("jsonl", path) == ["a\ufffdb 🙂"]


@pytest.mark.parametrize(
    "line, says",
    [
        (b"{", "not JSON"),
        (b"[1]", "no field 'text' (it has list)"),
        (b'{"content": "x"}', "no field 'text' (it has content); name the text's by --text-column"),
        (b'{"text": 5}', "int where text is expected"),
        (b'{"text": "\xff"}', "not UTF-8 text"),
    ],
)
def test_bad_json_lines_name_file_and_line(tmp_path, line, says):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        texts("jsonl", path)
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value)


def test_bad_files_name_the_file(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"bad.txt: not UTF-8 text \(byte 2\)"):
        texts("text", tmp_path / "bad.txt")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="bad.parquet: not readable as parquet"):
        texts("parquet", tmp_path / "bad.parquet")
    whole = gzip.compress(b"hello " * 1000)
    for data in (whole[:-9], b"plain", whole[:20] + b"????" + whole[24:]):
        (tmp_path / "bad.txt.gz").write_bytes(data)
        with pytest.raises(UserError, match="bad.txt.gz: cannot be read"):
            texts("text", tmp_path / "bad.txt.gz")


def test_bad_parquet_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"id": 1, "words": ["a"]}])
    with pytest.raises(UserError, match=r"no column 'text' \(it has id, words\); name one by --text-column"):
        texts("parquet", path)
    with pytest.raises(UserError, match="row 1: int where text is expected"):
        texts("parquet", path, column="id")


@pytest.mark.parametrize(
    "kind, inputs, says",
    [
        ("text", [], "--source text needs at least one file"),
        ("text", ["nowhere"], "--input .*nowhere: no such file, folder or match"),
        ("text", ["*.none"], "no such file, folder or match"),
        ("jsonl", ["."], "no .jsonl or .jsonl.gz files in it"),
        ("python-docs", ["a.txt"], "leave --input out"),
    ],
)
def test_inputs_that_give_nothing(tmp_path, kind, inputs, says):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=says):
        texts(kind, *(tmp_path / name for name in inputs))


def test_docstrings_in_source_order():
    source = '''
        """Module."""
        class A:
            """Class A."""
            def method(self):
                """Method,
                indented
                   once."""
                def inner(): "Inner."
            x = """no docstring"""
        def nothing(): pass
        try:
            async def late(): "Late."
        except ImportError:
            def late(): "Fallback."
        if True:
            pass
        else:
            class B: "In else."
    '''
    assert list(docstrings(ast.parse(textwrap.dedent(source)), "m")) == [
        ("m", "Module."),
        ("m.A", "Class A."),
        ("m.A.method", "Method,\nindented\n   once."),
        ("m.A.method.inner", "Inner."),
        ("m.late", "Late."),
        ("m.late", "Fallback."),
        ("m.B", "In else."),
    ]


def test_python_docs_are_what_python_itself_shows():
    """The texts equal what importing the modules gives; the source itself never imports them."""
    source = PythonDocs()
    found = [text for text, _ in source.read(source.topics)]
    assert found == [text.strip() + "\n" for text in pydoc_data.topics.topics.values()]
    file = source.library / "json" / "decoder.py"
    assert file in source.files
    [(text, position)] = source.read(file)
    assert position == file.stat().st_size
    sections = text.split("json.decoder")
    shown = ["", *(f".{name}\n\n{inspect.getdoc(owner)}\n\n" for name, owner in [
        ("JSONDecodeError", json.decoder.JSONDecodeError),
        ("py_scanstring", json.decoder.py_scanstring),
        ("JSONDecoder", json.decoder.JSONDecoder),
        ("JSONDecoder.__init__", json.decoder.JSONDecoder.__init__),
        ("JSONDecoder.decode", json.decoder.JSONDecoder.decode),
        ("JSONDecoder.raw_decode", json.decoder.JSONDecoder.raw_decode),
    ])]  # fmt: skip
    assert sections[1] == f"\n\n{json.decoder.__doc__.strip()}\n\n"
    assert [section.strip() for section in sections[2:]] == [section.strip() for section in shown[1:]]


def test_python_docs_leave_out_tests_and_other_packages():
    source = PythonDocs()
    folders = {file.relative_to(source.library).parts[0] for file in source.files}
    assert {"json", "asyncio", "textwrap.py"} <= folders
    assert not {"test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"} & folders
