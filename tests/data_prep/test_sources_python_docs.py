import ast
import inspect
import json.decoder
import pydoc_data.topics
import textwrap
from pathlib import Path

from reading import read_unit, source_of

from data_prep.sources.python_docs import docstrings
from data_prep.sources.source import Segment, Tally, Unit


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


def documents_in(source, file):
    unit = Unit(0, 0, 0, file.stat().st_size, (Segment(file, str(file)),))
    return read_unit(source.reader, unit, Tally())


def test_python_docs_are_what_python_itself_shows():
    """The texts equal what importing the modules gives; the source itself never imports them."""
    source = source_of("python-docs")
    topics = Path(source.files[0].name)
    assert documents_in(source, topics) == [text.strip() + "\n" for text in pydoc_data.topics.topics.values()]
    file = source.reader.library / "json" / "decoder.py"
    assert str(file) in {file.name for file in source.files}
    [text] = documents_in(source, file)
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
    source = source_of("python-docs")
    files = [Path(file.name).relative_to(source.reader.library) for file in source.files]
    folders = {file.parts[0] for file in files}
    assert {"json", "asyncio", "textwrap.py"} <= folders
    assert not {"test", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"} & folders
    assert files[1:] == sorted(files[1:])


def test_the_revision_is_the_version_of_python():
    assert source_of("python-docs").describe("0" * 64) == {
        "kind": "python-docs",
        "revision": f"CPython {'.'.join(map(str, __import__('sys').version_info[:3]))}",
    }
