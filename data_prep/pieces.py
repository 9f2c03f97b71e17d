"""Long documents in pieces that are encoded one by one: the ids are those of the whole.

That bounds the memory and the time that one document can take.
"""

import re
from collections.abc import Iterator

import regex
from tiktoken_ext import openai_public

# Longer documents are cut.
PIECE_BYTES = 2**16
# How far before the place to cut a sure boundary is looked for, before falling back on the slow exact way. In bytes.
NEAR = 1024
# A space or line feed after anything that is not white space always begins a pre-token.
BREAK = re.compile(r"(?<=\S)[ \n]")
PRE_TOKEN = regex.compile(openai_public.r50k_pat_str)
# Length of the longest contraction, "'re": where an apostrophe's pre-token ends shows only beyond it.
CONTRACTION = 3


def cut(document: bytes) -> Iterator[tuple[bytes, bool]]:
    """The document in pieces of at most PIECE_BYTES, each with whether it ends inside a pre-token.

    A piece ends between pre-tokens. Only where a single pre-token fills it (with the white space or symbols before
    that cannot be told from it) is it cut at its last whole character.
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
    # The first character may be cut, and is then left out.
    near = text[max(0, len(text) - NEAR) :].decode("utf-8", "ignore")
    places = [match.start() for match in BREAK.finditer(near)]
    if not places:
        near = text.decode("utf-8")
        # The last match may go on beyond the text, but begins where it does whatever follows. White space must not
        # end a piece: at the end of a text it is one pre-token, before more text its last character stands alone.
        places = [match.start() for match in PRE_TOKEN.finditer(near)]
        last = len(near) - CONTRACTION
        places = [place for place in places if 0 < place <= last and not near[place - 1].isspace()]
    return len(text) - len(near[places[-1] :].encode("utf-8")) if places else 0
