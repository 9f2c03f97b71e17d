"""What is begun when, with a pool whose parts become complete when the test says so."""

import dataclasses
from concurrent.futures import Future
from pathlib import Path

import pytest

from data_prep import schedule
from data_prep.parts import PartRecord
from data_prep.pool import Pool
from data_prep.schedule import Schedule
from data_prep.sources.source import Segment, Unit
from megaresid.errors import UserError

TOKENS = 100


def units(count):
    return [Unit(0, n, 10 * n, 10, (Segment(Path("x"), f"file {n}"),)) for n in range(count)]


def record_of(unit):
    counts = dict(position=unit.position, bytes=unit.bytes, documents=1, tokens=TOKENS, text_bytes=1, runs_cut=0)
    return PartRecord(name=unit.name, plan="", dropped={}, backend="", proven_bytes=0, blocks=(), **counts)


class HandPool(Pool):
    """Two workers; all parts are complete at once, but for the first, which waits for the fifth report. Part ``bad``
    fails."""

    def __init__(self, bad=None):
        self.workers, self.bad, self.begun, self.reports, self.closed = 2, bad, [], [], False

    def make_part(self, serial, unit):
        future = Future()
        self.begun.append(unit)
        if len(self.begun) == 1:
            self.first = future
        elif unit.index == self.bad:
            future.set_exception(UserError("bad"))
        else:
            future.set_result(record_of(unit))
        return future

    def report(self, *counts):
        self.reports.append(counts)
        if len(self.reports) == 5:
            self.first.set_result(record_of(self.begun[0]))

    def at_work(self):
        return {1: (5, 0, 0)}

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(schedule, "SECONDS_BETWEEN_REPORTS", 0.0)


def test_parts_come_in_order_while_later_ones_are_made():
    pool = HandPool()
    names = []
    for record in Schedule(iter(units(12)), {}, pool, 120, None, pool.report).records():
        if not names:
            assert len(pool.begun) > 4, "what is complete makes room for more"
        names.append(record.name)
    assert names == [unit.name for unit in units(12)] and pool.closed
    # Half of the first unit was done by its worker, when the next ones were complete.
    assert pool.reports[0] == (0.0, 0, 0) and (0.5 * 10 + 30) / 120 in [fraction for fraction, _, _ in pool.reports]


def test_no_more_is_begun_than_the_limit_may_want():
    pool = HandPool()
    taken = Schedule(iter(units(12)), {}, pool, 120, 5 * TOKENS // 2, pool.report)
    records = taken.records()
    next(records)
    # Four at first; of these three are complete, which may be enough.
    assert len(pool.begun) == 4
    taken.assembled_tokens = TOKENS
    next(records)
    assert len(pool.begun) == 4
    records.close()
    assert pool.closed


def test_after_a_failure_nothing_is_begun_and_it_comes_in_its_turn():
    pool = HandPool(bad=2)
    names = []
    with pytest.raises(UserError, match="bad"):
        for record in Schedule(iter(units(12)), {}, pool, 120, None, pool.report).records():
            names.append(record.name)
    assert names == [unit.name for unit in units(2)] and len(pool.begun) == 4 and pool.closed


def test_complete_parts_are_counted_and_not_made():
    pool = HandPool()
    found = {unit.name: record_of(unit) for unit in units(12)[3:9]}
    records = Schedule(iter(units(12)), found, pool, 120, None, pool.report).records()
    assert [record.name for record in records] == [unit.name for unit in units(12)]
    assert pool.reports[0] == (0.5, 6, 6 * TOKENS)
    assert not {unit.name for unit in pool.begun} & set(found)


def test_a_part_of_another_unit_of_the_same_name_is_made_anew():
    """As of a file that could not be cut when its part was made."""
    for change in (dict(bytes=99), dict(position=9)):
        pool, (kept, other) = HandPool(), units(2)
        found = {kept.name: record_of(kept), other.name: record_of(dataclasses.replace(other, **change))}
        records = Schedule(iter([kept, other]), found, pool, 20, None, pool.report).records()
        assert list(records) == [record_of(kept), record_of(other)]
        assert pool.begun == [other]
