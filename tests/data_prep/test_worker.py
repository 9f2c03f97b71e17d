import gzip
import hashlib
import pickle
import random
import struct
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
from test_backends import random_text

from data_prep.parts import read_record
from data_prep.sources.source import Batch, Reader, Segment, Unit, Unreadable
from data_prep.sources.text import TextReader
from data_prep.tokenizer import gpt2_encoding
from data_prep.worker import Worker, WorkerOptions
from megaresid.errors import UserError

PLAN = "ab" * 32
UNIT = Unit(group=0, index=4, position=10, bytes=1_000_000, segments=())
NAME = "000000-000004"
ENCODE = gpt2_encoding().encode_ordinary


@dataclass(frozen=True)
class Given(Reader):
    """Reads what it is given; ``error`` is raised after that."""

    batches: tuple[tuple[bytes, ...], ...]
    error: Exception | None = None

    def read(self, unit, tally):
        for number, documents in enumerate(self.batches, 1):
            tally["empty"] += 2
            tally["bad_rows"] += 0
            yield Batch(list(documents), number * 1000)
        if self.error:
            raise self.error


def texts(seed, count):
    generator = random.Random(seed)
    return tuple(random_text(generator, generator.choice([1, 20, 200])) + b"%d" % n for n in range(count))


def worker(folder, reader, backend="tiktoken", **options):
    return Worker(WorkerOptions(reader, folder, PLAN, backend=backend, **options))


@pytest.mark.parametrize("backend", ["tiktoken", "gigatoken"])
def test_a_part_is_the_documents_in_order(tmp_path, backend):
    pytest.importorskip(backend)
    long = b"It's a long one, " * 10_000
    batches = (texts(1, 50), (long,), texts(2, 30), (b"<|endoftext|>", b"a" * 200_000), (b"c",), (b"b" * 70_000,))
    reports = []
    record = worker(tmp_path, Given(batches), backend).make_part(UNIT, lambda *counts: reports.append(counts))

    documents = [document for batch in batches for document in batch]
    ids = [[50256, *ENCODE(document.decode())] for document in documents]
    for n, pieces in ((-3, [b"a" * 65536] * 3 + [b"a" * (200_000 - 3 * 65536)]), (-1, [b"b" * 65536, b"b" * 4464])):
        ids[n] = [50256, *(id for piece in pieces for id in ENCODE(piece.decode()))]
    assert (tmp_path / f"{NAME}.ids").read_bytes() == b"".join(struct.pack(f"<{len(some)}H", *some) for some in ids)
    rows = [hashlib.sha256(d).digest() + struct.pack("<I", len(n)) for d, n in zip(documents, ids, strict=True)]
    assert (tmp_path / f"{NAME}.docs").read_bytes() == b"".join(rows)
    assert read_record(tmp_path, NAME, PLAN) == record
    assert (record.position, record.bytes, record.backend) == (10, 1_000_000, backend)
    assert (record.documents, record.tokens) == (len(documents), sum(map(len, ids)))
    assert record.text_bytes == sum(map(len, documents))
    assert record.runs_cut == 4 and record.dropped == {"empty": 12}
    assert record.proven_bytes <= record.text_bytes * 0.005
    assert (record.proven_bytes > 0) == (backend == "gigatoken")

    assert [position for position, _, _ in reports] == sorted(position for position, _, _ in reports)
    assert {position for position, _, _ in reports} == {1000, 2000, 3000, 4000, 5000, 6000}
    assert reports[-1] == (6000, record.documents, record.tokens)


def test_a_difference_from_tiktoken_leaves_no_part(tmp_path):
    made = worker(tmp_path, Given((texts(3, 50),)), "tiktoken")

    class Liar:
        name = "liar"

        def encode(self, text):
            return made._checker.encode(text)[::-1]

    made.backend = Liar()
    with pytest.raises(UserError, match=f"part {NAME}, document .* liar differs from tiktoken"):
        made.make_part(UNIT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [Unreadable("a.parquet", "broken off"), OSError(28, "No space left"), MemoryError()])
def test_whatever_goes_wrong_leaves_no_part(tmp_path, error):
    with pytest.raises(type(error)):
        worker(tmp_path, Given((texts(3, 5),), error)).make_part(UNIT)
    assert list(tmp_path.iterdir()) == []


def test_a_report_may_stop_it(tmp_path):
    def report(position, documents, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker(tmp_path, Given((texts(3, 5),))).make_part(UNIT, report)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_left_out_whole_when_asked(tmp_path, capsys):
    """Of a unit of several files, only those at fault: the part is that of the others."""
    files = []
    for number in range(6):
        text = gzip.compress(f"text {number}".encode())
        path = tmp_path / f"{number}.txt.gz"
        path.write_bytes(text[:20] if number in (1, 4) else text)
        files.append(Segment(path, path.name))
    unit = replace(UNIT, segments=tuple(files))
    asked = worker(tmp_path, TextReader(), skip_unreadable=True)
    record = asked.make_part(unit)
    assert record.dropped == {"unreadable": 2} and record.documents == 4
    ids = [id for number in (0, 2, 3, 5) for id in (50256, *ENCODE(f"text {number}"))]
    assert (tmp_path / f"{NAME}.ids").read_bytes() == struct.pack(f"<{len(ids)}H", *ids)
    assert read_record(tmp_path, NAME, PLAN) == record
    assert capsys.readouterr().err.splitlines() == [f"left out: {n}.txt.gz: cannot be read" for n in (1, 4)]

    record = asked.make_part(replace(UNIT, segments=(files[1],)))
    assert record.dropped == {"unreadable": 1}
    assert record.documents == record.tokens == record.text_bytes == 0 and record.blocks == ()
    with pytest.raises(Unreadable, match="1.txt.gz"):
        worker(tmp_path, TextReader()).make_part(unit)


def test_a_file_that_became_shorter_makes_no_part(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("short")
    unit = replace(UNIT, segments=(Segment(path, "a.txt", size=6),))
    with pytest.raises(Unreadable, match="5 bytes, and 6 when it was listed"):
        worker(tmp_path, TextReader()).make_part(unit)
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert worker(tmp_path, TextReader(), skip_unreadable=True).make_part(unit).dropped == {"unreadable": 1}


def test_what_is_no_fault_of_a_file_stops_it(tmp_path):
    for error in (UserError("--text-column nothing: no such column"), Unreadable("of no segment", "broken off")):
        with pytest.raises(UserError, match=str(error)[:20]):
            worker(tmp_path, Given((texts(3, 5),), error), skip_unreadable=True).make_part(UNIT)


def test_a_missing_vocabulary_is_told(tmp_path):
    with pytest.raises(UserError, match="--vocab-file .*missing: No such file"):
        worker(tmp_path, Given(()), vocab_file=tmp_path / "missing")


def test_the_options_can_be_passed_on(tmp_path):
    options = WorkerOptions(Given(((b"a",),)), tmp_path, PLAN)
    assert pickle.loads(pickle.dumps(options)) == options and len(pickle.dumps(options)) < 1000


def test_importing_stays_light():
    code = (
        "import sys, data_prep.worker\n"
        "heavy = 'torch tyro rich pyarrow gigatoken awkward transformers huggingface_hub matplotlib'.split()\n"
        "print(*sorted(set(heavy) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
