"""What tests of sources read with."""

from collections import Counter
from pathlib import Path

from data_prep.job import Job
from data_prep.sources import open_source


def source_of(kind, *inputs, **options):
    return open_source(Job(source=kind, out=Path("unused"), input=tuple(map(str, inputs)), **options))


def read(kind, *inputs, **options):
    """(documents as str, what was left out as a dict) of a whole source, unit by unit."""
    documents, dropped, source = [], Counter(), source_of(kind, *inputs, **options)
    for unit in source.units():
        documents += read_unit(source.reader, unit, dropped)
    return documents, dict(dropped)


def read_unit(reader, unit, dropped):
    """The documents of a unit, with what holds for all batches."""
    documents, before = [], 0
    for batch in reader.read(unit, dropped):
        assert batch.documents and before <= batch.position <= unit.bytes
        before = batch.position
        documents += [document.decode() for document in batch.documents]
    return documents
