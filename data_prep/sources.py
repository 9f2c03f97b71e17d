"""Where documents come from: one class a kind of source, each a stream of (text, bytes read so far).

Documents come in a fixed order: the files of each --input in the order given, those of a folder or pattern sorted.
"""

import ast
import glob
import gzip
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from megaresid.errors import UserError

# The text of a document, and how many bytes of the source (in ``read``: of the file) have been read with it.
Document = tuple[str, int]


class Source:
    """Documents of one kind. ``bytes`` is the size of all its files, for the progress bar."""

    kind: str

    def __init__(self, files: list[Path]):
        self.files = files
        self.bytes = sum(file.stat().st_size for file in files)

    def documents(self) -> Iterator[Document]:
        """All documents; empty ones too. Raises UserError naming file and row for what cannot be read."""
        before = 0
        for file in self.files:
            try:
                for text, position in self.read(file):
                    yield text, before + position
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{file}: cannot be read ({error}); get a good copy or leave it out") from None
            before += file.stat().st_size

    def read(self, file: Path) -> Iterator[Document]:
        """The documents of one file, each with the bytes of the file read so far."""
        raise NotImplementedError

    def revision(self, documents_sha256: str) -> str:
        """What changes when the text does; ``documents_sha256`` is the hash of the documents as they came."""
        return f"sha256:{documents_sha256}"


class TextFiles(Source):
    """Each file one document."""

    kind = "text"
    suffixes = (".txt", ".txt.gz")

    def read(self, file: Path) -> Iterator[Document]:
        with open_bytes(file) as stream:
            yield decode(stream.read(), f"{file}"), file.stat().st_size


class JsonLines(Source):
    """Each line a JSON object with the text in one field; null counts as empty."""

    kind = "jsonl"
    suffixes = (".jsonl", ".jsonl.gz")

    def __init__(self, files: list[Path], column: str):
        super().__init__(files)
        self.column = column

    def read(self, file: Path) -> Iterator[Document]:
        with open(file, "rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as stream:
            for number, line in enumerate(stream, 1):
                if line.isspace():
                    continue
                yield self._text(decode(line, f"{file}:{number}"), f"{file}:{number}"), raw.tell()

    def _text(self, line: str, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict) or self.column not in row:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{where}: no field {self.column!r} (it has {has}); name the text's by --text-column")
        return checked_text(row[self.column], f"{where}: field {self.column!r}")


class Parquet(Source):
    """Each row a document; only the text column is read, a batch of rows at a time. Null counts as empty."""

    kind = "parquet"
    suffixes = (".parquet",)

    def __init__(self, files: list[Path], column: str):
        super().__init__(files)
        self.column = column

    def read(self, file: Path) -> Iterator[Document]:
        import pyarrow
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(file) as table:
                if self.column not in table.schema_arrow.names:
                    has = ", ".join(table.schema_arrow.names)
                    raise UserError(f"{file}: no column {self.column!r} (it has {has}); name one by --text-column")
                rows, size, row = table.metadata.num_rows, file.stat().st_size, 0
                for batch in table.iter_batches(batch_size=1024, columns=[self.column]):
                    for value in batch.column(0).to_pylist():
                        row += 1
                        yield checked_text(value, f"{file}: row {row}"), size * row // rows
        except pyarrow.ArrowException as error:
            raise UserError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from None


class PythonDocs(Source):
    """The documentation in Python's own standard library: help topics, then the docstrings of each module.

    Files are parsed, never imported. A module is one document: its name, its docstring, then each class and function
    in the order of the source, as qualified name and docstring.
    """

    kind = "python-docs"
    skipped = frozenset(
        "test tests idlelib lib2to3 turtledemo ensurepip site-packages dist-packages pydoc_data __pycache__".split()
    )
    # Modules with less are names and one-liners, not text.
    least_characters = 100

    def __init__(self):
        self.library = Path(sysconfig.get_path("stdlib"))
        self.topics = self.library / "pydoc_data" / "topics.py"
        if not self.topics.is_file():
            raise UserError(f"{self.topics}: missing, this Python came without its help topics; use --source text")
        super().__init__([self.topics, *sorted(self._modules())])

    def _modules(self) -> Iterator[Path]:
        for folder, below, names in os.walk(self.library):
            # In place, so that site-packages, which may hold very many files, is not walked at all.
            below[:] = [name for name in below if name not in self.skipped and not name.startswith("config-")]
            yield from (Path(folder, name) for name in names if name.endswith(".py"))

    def read(self, file: Path) -> Iterator[Document]:
        tree, size = ast.parse(file.read_bytes(), str(file)), file.stat().st_size
        if file == self.topics:
            for text in topics(tree).values():
                yield text.strip() + "\n", size
            return
        module = file.relative_to(self.library).with_suffix("")
        name = ".".join(part for part in module.parts if part != "__init__")
        sections = list(docstrings(tree, name))
        if sum(len(docstring) for _, docstring in sections) >= self.least_characters:
            yield "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in sections) + "\n", size

    def revision(self, documents_sha256: str) -> str:
        return f"{platform.python_implementation()} {platform.python_version()}"


def topics(tree: ast.Module) -> dict[str, str]:
    """The dictionary of help topics in the source of ``pydoc_data.topics``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "topics":
            return ast.literal_eval(node.value)
    raise UserError("pydoc_data/topics.py: no dictionary named topics in it; use --source text")


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, cleaned docstring) of a module, class or function and of all inside it, in source order."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, owners) and (docstring := ast.get_docstring(node)):
        yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, owners):
            yield from docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from docstrings(child, name)


SOURCES: dict[str, type[Source]] = {source.kind: source for source in (PythonDocs, TextFiles, JsonLines, Parquet)}


def open_source(kind: str, inputs: tuple[str, ...], column: str) -> Source:
    """The source of a kind: ``inputs`` are files, folders and glob patterns, ``column`` the field with the text.

    Raises UserError when inputs are missing, match nothing, or are given to a source that takes none.
    """
    if kind == PythonDocs.kind:
        if inputs:
            raise UserError(f"--input {inputs[0]}: --source {kind} reads this Python's own library; leave --input out")
        return PythonDocs()
    if not inputs:
        raise UserError(f"--input: --source {kind} needs at least one file, folder or pattern")
    files = find_files(inputs, SOURCES[kind].suffixes)
    return TextFiles(files) if kind == TextFiles.kind else SOURCES[kind](files, column)


def find_files(inputs: tuple[str, ...], suffixes: tuple[str, ...]) -> list[Path]:
    """The files that the inputs name, each once. A folder stands for the files in and below it with one of the
    suffixes; a file or pattern is taken as it is. Raises UserError for an input that gives none."""
    found: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(match) for match in glob.glob(name, recursive=True) if Path(match).is_file())
        if not files:
            kinds = f"no {' or '.join(suffixes)} files in it" if path.is_dir() else "no such file, folder or match"
            raise UserError(f"--input {name}: {kinds}; check the path")
        found.update(dict.fromkeys(files))
    return list(found)


def open_bytes(file: Path):
    """A file's bytes, decompressed when its name ends in .gz."""
    return gzip.open(file) if file.suffix == ".gz" else open(file, "rb")


def decode(data: bytes, where: str) -> str:
    """UTF-8 text; UserError naming ``where`` otherwise."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start}); convert or remove it") from None


def checked_text(value: object, where: str) -> str:
    """A row's text: null is empty, half a surrogate pair (JSON can spell one) becomes U+FFFD."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {type(value).__name__} where text is expected; name the text's by --text-column")
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
