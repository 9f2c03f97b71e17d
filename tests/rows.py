"""Tables of tests: rows of one definition each, which stand in files ``define_<family>.py`` as ``ROWS``."""

import importlib
from pathlib import Path

import pytest


def rows_of(folder: Path) -> list:
    """The rows of all families of a folder, which is on the path of imports."""
    files = sorted(folder.glob("define_*.py"))
    return [row for file in files for row in importlib.import_module(file.stem).ROWS]


def quick(rows: list, chosen: list) -> list:
    """All rows as a test's parameters: those not ``chosen`` run in the full tier only."""
    return [row if row in chosen else pytest.param(row, marks=pytest.mark.full) for row in rows]


def one_of_each(rows: list) -> list:
    """A row for every component: the one with the fewest options."""
    shortest = sorted(rows, key=lambda row: len(row.spec))
    return list({row.spec.partition("(")[0]: row for row in reversed(shortest)}.values())
