"""Files as streams of bytes, decompressed by the end of their name."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_prep.sources.source import Unreadable

COMPRESSED = (".gz", ".zst")
BUFFER_BYTES = 2**20


@contextmanager
def open_stream(path: Path, name: str) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The file's bytes, decompressed where its name ends in .gz or .zst (all members or frames), and the file itself,
    whose ``tell`` is how many bytes of it were read. What fails while it is open raises Unreadable with ``name``."""
    try:
        with open(path, "rb", buffering=BUFFER_BYTES) as raw:
            if path.name.endswith(".gz"):
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER_BYTES), raw
            elif path.name.endswith(".zst"):
                import pyarrow

                with pyarrow.CompressedInputStream(raw, "zstd") as stream:
                    yield io.BufferedReader(stream, BUFFER_BYTES), raw
            else:
                yield raw, raw
    except (OSError, EOFError, zlib.error) as error:
        raise Unreadable(name, error) from None
