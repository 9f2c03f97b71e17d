"""Every mixer beside its definition: the rows that the tests of this folder go through.

A family's rows stand in its file ``define_<family>.py`` as ``ROWS``.
"""

import importlib
from pathlib import Path

import pytest
from mixer_row import Row

FAMILIES = ("softmax", "linear", "delta", "blends")

ROWS: list[Row] = [
    row
    for file in sorted(Path(__file__).parent.glob("define_*.py"))
    for row in importlib.import_module(file.stem).ROWS
]
FAMILY_HEADS = [row for row in ROWS if row.head_of_family]
ROWS_OF_ANY_LENGTH = [row for row in ROWS if not row.grows]


def quick(chosen: list[Row]) -> list:
    """All rows as a test's parameters: those not ``chosen`` run in the full tier only."""
    return [row if row in chosen else pytest.param(row, marks=pytest.mark.full) for row in ROWS]


def one_of_each(rows: list[Row]) -> list[Row]:
    """A row for every mixer: the one with the fewest options."""
    shortest = sorted(rows, key=lambda row: len(row.spec))
    return list({row.spec.partition("(")[0]: row for row in reversed(shortest)}.values())


ONE_OF_EACH = one_of_each(ROWS)
