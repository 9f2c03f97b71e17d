"""Fixtures for every test."""

import pytest

pytest.register_assert_rewrite("compiled", "courses")

from ranks import RankPool  # noqa: E402


@pytest.fixture(scope="session")
def ranks1():
    """One rank, started when first used: ``ranks1.run(function, *args)``."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks2():
    """Two ranks, started when first used: ``ranks2.run(function, *args)`` gives ``[of rank 0, of rank 1]``."""
    pool = RankPool(2)
    yield pool
    pool.close()
