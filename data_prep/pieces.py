"""Long documents in pieces that are encoded one by one: the ids are those of the whole.

That bounds the memory and the time that one document can take.
"""

import re
from collections.abc import Iterator

# Longer documents are cut.
PIECE_BYTES = 2**16
# How far before the place to cut a sure boundary is looked for at first. In bytes.
NEAR = 1024
# Characters of which every version of Unicode says the same. The apostrophe stands apart: letters after it may be of
# its pre-token, as in "'re".
LETTERS = "A-Za-zÀ-ÖØ-öø-ÿΑ-ΡΣ-Ωα-ωА-яぁ-ゖァ-ヺ一-龥가-힣"
DIGITS = "0-9０-９"
SYMBOLS = r"""!-&(-/:-@[-`{-~、。「」！，．：；？"""
# Where a pre-token begins whatever comes before and after: at a space or line feed after anything that is not white
# space, and between two kinds of characters.
BOUNDARY = re.compile(
    rf"(?<=\S)[ \n]|(?<=[{LETTERS}])(?=[{DIGITS}{SYMBOLS}'])|(?<=[{DIGITS}])(?=[{LETTERS}{SYMBOLS}'])"
    rf"|(?<=[{SYMBOLS}])(?=[{LETTERS}{DIGITS}])"
)


def cut(document: bytes) -> Iterator[tuple[bytes, bool]]:
    """The document in pieces of at most PIECE_BYTES, each with whether it may end inside a pre-token.

    A piece ends where a pre-token surely begins. Only where it has no such place (it is one run of letters, or of
    characters of which versions of Unicode differ) is it cut at its last whole character.
    """
    start = 0
    while len(document) - start > PIECE_BYTES:
        end = whole_characters(document, start + PIECE_BYTES)
        length = _last_boundary(document[start:end])
        yield document[start : start + length if length else end], not length
        start += length or end - start
    yield document[start:], False


def whole_characters(document: bytes, place: int) -> int:
    """The last place not after this one where a character begins or the document ends."""
    while place < len(document) and document[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _last_boundary(text: bytes) -> int:
    """The length up to the last sure beginning of a pre-token inside ``text``, which goes on; 0 without one."""
    for searched in (text[max(0, len(text) - NEAR) :], text):
        # The first character may be cut, and is then left out.
        characters = searched.decode("utf-8", "ignore")
        if places := [match.start() for match in BOUNDARY.finditer(characters)]:
            return len(text) - len(characters[places[-1] :].encode("utf-8"))
    return 0
