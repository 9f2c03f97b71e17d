"""The documentation in Python's own standard library: help topics, then the docstrings of each module."""

import ast
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.sources.batches import in_batches
from data_prep.sources.checked import refusal
from data_prep.sources.find_files import local_file
from data_prep.sources.source import Batch, Reader, Source, Tally, Unit
from data_prep.sources.streams import open_stream
from megaresid.errors import UserError

SKIPPED = frozenset(
    "test tests idlelib lib2to3 turtledemo ensurepip site-packages dist-packages pydoc_data __pycache__".split()
)
# Modules with less are names and one-liners, not text.
LEAST_CHARACTERS = 100


@dataclass(frozen=True)
class PythonDocsReader(Reader):
    """Files are parsed, never imported. A module is one document: its name, its docstring, then each class and function
    in the order of the source, as qualified name and docstring."""

    library: Path

    def read(self, unit: Unit, tally: Tally) -> Iterator[Batch]:
        return in_batches(self._documents(unit, tally))

    def _documents(self, unit: Unit, tally: Tally) -> Iterator[tuple[bytes, int]]:
        position = 0
        for segment in unit.segments:
            with open_stream(segment.path, segment.name) as (stream, _):
                source = stream.read()
            position += len(source)
            for text in self.texts(segment.path, source):
                document = text.encode()
                if reason := refusal(document):
                    tally[reason] += 1
                else:
                    yield document, min(position, unit.bytes)

    def texts(self, file: Path, source: bytes) -> Iterator[str]:
        """The documents in one file of the library."""
        tree = ast.parse(source, str(file))
        if file == topics_file(self.library):
            yield from (text.strip() + "\n" for text in topics(tree).values())
            return
        module = file.relative_to(self.library).with_suffix("")
        name = ".".join(part for part in module.parts if part != "__init__")
        sections = list(docstrings(tree, name))
        if sum(len(docstring) for _, docstring in sections) >= LEAST_CHARACTERS:
            yield "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in sections) + "\n"


class PythonDocs(Source):
    """The library of the Python that runs this, whose version is the revision."""

    kind = "python-docs"

    def __init__(self):
        library = Path(sysconfig.get_path("stdlib"))
        first = topics_file(library)
        if not first.is_file():
            raise UserError(f"{first}: missing, this Python came without its help topics; use --source text")
        files = [first, *sorted(_modules(library))]
        super().__init__([local_file(file) for file in files], PythonDocsReader(library))

    def describe(self, documents_sha256: str) -> dict[str, str]:
        return {"kind": self.kind, "revision": f"{platform.python_implementation()} {platform.python_version()}"}


def topics_file(library: Path) -> Path:
    return library / "pydoc_data" / "topics.py"


def _modules(library: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(library):
        # In place, so that site-packages, which may hold very many files, is not walked at all.
        below[:] = [name for name in below if name not in SKIPPED and not name.startswith("config-")]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


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
