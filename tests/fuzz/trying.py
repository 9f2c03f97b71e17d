"""Inputs by the thousand: each works or is told in one line, within its time and its memory, and all are counted.

Inputs start from valid ones and are changed; noise alone would rarely come past the first check.
"""

import copy
import json
import random
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megaresid.errors import UserError

SECONDS = 10.0
"""For one input."""

MEMORY = 1 << 30
"""Bytes that one test may take beyond what the process had."""

FULL = 10
"""The full tier tries so many times as many inputs."""


def fuzz(examples: int, **inputs: st.SearchStrategy) -> Callable:
    """Decorator: a test that calls the function with ``examples`` inputs, drawn anew in the full tier, and beforehand
    with the path of a folder of its own. The function returns what the input came to, in a word, to be counted; a
    ``UserError`` of one line counts as refused."""

    def decorate(check: Callable[..., str]) -> Callable:
        @pytest.mark.parametrize("times", [1, pytest.param(FULL, marks=pytest.mark.full)], ids=["quick", "full"])
        def test(times, tmp_path, record_property):
            counts: dict[str, int] = {}

            def one(**drawn):
                with in_time():
                    outcome = outcome_of(check, tmp_path, **drawn)
                counts[outcome] = counts.get(outcome, 0) + 1

            limits = settings(
                max_examples=examples * times,
                deadline=None,
                database=None,
                derandomize=times == 1,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink],
            )
            with in_memory():
                limits(given(**inputs)(one))()
            record_property("inputs tried", counts)
            assert sum(counts.values()) >= 0.9 * examples * times, f"inputs repeat: {counts}"
            assert len(counts) > 1, f"all came to the same, which tests nothing: {counts}"

        test.__doc__ = check.__doc__
        test.__name__ = test.__qualname__ = check.__name__
        test.__module__ = check.__module__
        return test

    return decorate


def outcome_of(check: Callable[..., str], *given: Any, **named: Any) -> str:
    try:
        return check(*given, **named)
    except UserError as error:
        said = str(error)
        assert said.strip(), "an error without words"
        assert "Traceback" not in said
        assert len(said) < 50_000, f"an error of {len(said)} characters"
        return "refused"


@contextmanager
def in_time():
    """Raises TimeoutError in what takes longer than SECONDS of this process's own time, or much longer in all: on a
    busy machine everything waits."""

    def late(number, frame):
        raise TimeoutError(f"no end within {SECONDS} s")

    clocks = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, 30 * SECONDS)}
    before = {number: signal.signal(number, late) for number, _ in clocks.values()}
    for clock, (_, seconds) in clocks.items():
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for clock in clocks:
            signal.setitimer(clock, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def in_memory():
    """The most memory that the process ever held during the block is bounded."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    except OSError:  # not permitted in every container: the peak may be an earlier test's, which only hides ours
        pass
    before = _memory("VmHWM")
    yield
    taken = _memory("VmHWM") - before
    assert taken < MEMORY, f"{taken / 2**20:,.0f} MiB were taken"


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024


LONG = "an integer of 5001 digits"


def deep(levels: int, key: str | None = None) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value] if key is None else {key: value}
    return value


def nasty() -> st.SearchStrategy:
    """JSON values that parsers trip over."""
    numbers = [0, -1, 1, 2, 3, 7, 2**31, 2**31 - 1, 2**63, -(2**63), 2**64, 10**18, 10**400, LONG]
    floats = [0.0, -0.0, 0.5, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan")]
    words = ["", " ", "auto", "none", "null", "true", "0", "-1", "1e3", "nan", "../x", "/etc/passwd", "a\nb", "a\0b"]
    words += ["\ud800", "\u202e\u00e9", "x" * 5000, "[bold]", "%s{}", "\x1b[31m", "softmax", "adamw", "cpu"]
    containers = [[], {}, [[]], [0, 0], [0.9, 0.95], [None], {"": 0}, {"device": "cpu"}, {"enabled": True}, deep(60)]
    leaves = st.sampled_from([None, True, False, *numbers, *floats, *words])
    return st.one_of(leaves, leaves, st.sampled_from(containers), st.text(max_size=12), st.integers(), st.floats())


def trees(valid: Any, keys: list[str]) -> st.SearchStrategy:
    """A JSON tree with one to three changes; ``keys`` are those that may be added."""
    kinds = st.sampled_from(["set", "set", "set", "drop", "add", "swap"])
    return st.builds(
        changed_tree,
        st.just(json.dumps(valid)),
        st.lists(st.tuples(st.integers(0, 2**32), kinds, nasty()), min_size=1, max_size=3),
        st.just(tuple(keys)),
    )


def changed_tree(text: str, changes: list[tuple[int, str, Any]], keys: tuple[str, ...]) -> Any:
    root = [json.loads(text)]
    for seed, kind, value in changes:
        choose, value = random.Random(seed), copy.deepcopy(value)
        places = list(_places(root))
        place, key = choose.choice(places)
        if kind == "drop" and place is not root:
            del place[key]
        elif kind == "add" and isinstance(place[key], dict):
            place[key][choose.choice(keys) if keys and seed % 8 else str(value)[:30]] = value
        elif kind == "add" and isinstance(place[key], list):
            place[key].append(value)
        elif kind == "swap":
            other, at = choose.choice(places)
            place[key] = copy.deepcopy(other[at])
        else:
            place[key] = value
    return root[0]


def _places(tree: Any):
    """(container, key) of every value, the root's too, which stands in a list of its own."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def texts(valid: Any, keys: list[str]) -> st.SearchStrategy[bytes]:
    """The bytes of a JSON file: mostly of a changed tree, some damaged, some no JSON at all."""
    whole = trees(valid, keys).map(as_json)
    hopeless = [b"", b"null", b"[]", b"3", b'"x"', b"\xff\xfe{", b"{}", b"\xef\xbb\xbf{}"]
    hopeless += [b"[" * 100_000, b'{"a":' * 100_000, b'{"schema": 1' + b"0" * 5000 + b"}"]
    damaged = st.builds(changed_bytes, st.just(as_json(valid)), byte_changes())
    return st.one_of(whole, whole, whole, whole, damaged, st.sampled_from(hopeless))


def as_json(tree: Any) -> bytes:
    """Also of integers of more digits than Python writes."""
    text = json.dumps(tree, default=str)
    return text.replace(f'"{LONG}"', "1" + "0" * 5000).encode()


def byte_changes() -> st.SearchStrategy:
    kinds = st.sampled_from(["set", "set", "cut", "insert", "word", "word", "long", "double", "drop"])
    return st.lists(st.tuples(st.integers(0, 2**32), kinds, st.integers(0, 255)), min_size=1, max_size=4)


INTEGERS = [0, 1, 2, 255, 256, 1023, 2**15, 2**16]
INTEGERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def changed_bytes(data: bytes, changes: list[tuple[int, str, int]]) -> bytes:
    """Bytes set, cut off, put in and left out, and integers of four and eight bytes written over others."""
    made = bytearray(data)
    for seed, kind, value in changes:
        # Half of the changes are near the front, where headers are.
        reach = len(made) if seed % 2 else min(len(made), 64)
        at = (seed // 2) % (reach + 1)
        integer = INTEGERS[value % len(INTEGERS)]
        if kind == "set":
            made[at : at + 1] = bytes([value])
        elif kind == "cut":
            del made[at:]
        elif kind == "insert":
            made[at:at] = bytes([value]) * (1 + seed % 9)
        elif kind == "word":
            made[at & ~3 : (at & ~3) + 4] = (integer % 2**32).to_bytes(4, "little")
        elif kind == "long":
            made[at & ~7 : (at & ~7) + 8] = integer.to_bytes(8, "little")
        elif kind == "double":
            made += made[at : at + 1000]
        else:
            del made[at : at + 1 + seed % 9]
    return bytes(made)


def damaged(valid: bytes) -> st.SearchStrategy[bytes]:
    return st.builds(changed_bytes, st.just(valid), byte_changes())
