"""The text in a very long line of JSON, taken from its bytes: as Python objects such a line could fill the memory.

The line is searched, not checked: what is wrong in other values of it is passed over. The text itself is parsed as that
of short lines is, a part at a time.
"""

import re
from collections.abc import Callable, Collection

# Names, numbers and the like are shorter.
SHORT_BYTES = 4096
OTHER = object()
_CONTENT = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
STRING = re.compile(rb'"(%s)"' % _CONTENT, re.DOTALL)
BRACKET = re.compile(rb'"%s"|[\[\]{}]' % _CONTENT, re.DOTALL)
SCALAR = re.compile(rb'[^\s,:"\[\]{}]++')
SPACE = re.compile(rb"\s*+")
# Parts of a string end neither in an escape, nor a surrogate pair, nor a character; 1 MiB at most, and a bit.
PART = re.compile(
    rb"(?:[^\\]{1,4096}+[\x80-\xbf]*+|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\[^u]){1,256}+", re.DOTALL
)


def fields(line: bytes, text: str, others: Collection[str], parse: Callable[[bytes], object]) -> dict[str, object]:
    """The fields named ``text``, in UTF-8 where it is a string, and ``others``, of the object in a line.

    ``parse`` gives the value of JSON. Where an object or list stands, or another field is long, that is OTHER. As in
    JSON, the last field of a name counts. Raises ValueError where the line is no object.
    """
    found: dict[str, object] = {}
    at = _expect(line, b"{", 0)
    if _next(line, at) == b"}":
        return found
    while True:
        key = STRING.match(line, _skip_space(line, at))
        if key is None:
            raise ValueError("no name of a field")
        start = _skip_space(line, _expect(line, b":", key.end()))
        at = _value_end(line, start)
        name = parse(key[0]) if len(key[0]) < SHORT_BYTES else None
        if name == text and line[start] == ord('"'):
            found[name] = _utf8(line, start + 1, at - 1, parse)
        elif name == text or name in others:
            simple = line[start] not in b"[{" and at - start < SHORT_BYTES
            found[name] = parse(line[start:at]) if simple else OTHER
        if _next(line, at) == b"}":
            return found
        at = _expect(line, b",", at)


def _utf8(line: bytes, start: int, end: int, parse: Callable[[bytes], object]) -> bytes:
    """The string between these quotes."""
    text = bytearray()
    while start < end:
        part = PART.match(line, start, end)
        if part is None:
            raise ValueError("a bad escape")
        text += parse(b'"%s"' % part[0]).encode()
        start = part.end()
    return bytes(text)


def _value_end(line: bytes, start: int) -> int:
    """Where the value that begins at ``start`` ends."""
    first = line[start : start + 1]
    if first in (b"[", b"{"):
        depth = 0
        for match in BRACKET.finditer(line, start):
            bracket = line[match.start()]
            depth += (bracket in b"[{") - (bracket in b"]}")
            if depth == 0:
                return match.end()
        raise ValueError("a bracket is not closed")
    match = (STRING if first == b'"' else SCALAR).match(line, start)
    if match is None:
        raise ValueError("no value")
    return match.end()


def _skip_space(line: bytes, at: int) -> int:
    return SPACE.match(line, at).end()


def _next(line: bytes, at: int) -> bytes:
    at = _skip_space(line, at)
    return line[at : at + 1]


def _expect(line: bytes, mark: bytes, at: int) -> int:
    """Where what follows the mark begins."""
    at = _skip_space(line, at)
    if line[at : at + 1] != mark:
        raise ValueError(f"no {mark.decode()!r}")
    return at + 1
