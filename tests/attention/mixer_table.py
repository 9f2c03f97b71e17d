"""Every mixer beside its definition: the rows that the tests of this folder go through."""

from functools import partial
from pathlib import Path

import rows
from mixer_row import Row

FAMILIES = ("softmax", "linear", "delta", "blends")

ROWS: list[Row] = rows.rows_of(Path(__file__).parent)
FAMILY_HEADS = [row for row in ROWS if row.head_of_family]
ONE_OF_EACH = rows.one_of_each(ROWS)
ROWS_OF_ANY_LENGTH = [row for row in ROWS if not row.grows]

quick = partial(rows.quick, ROWS)
