"""A user's mistake, told in one line, with exit code 2."""

import functools
import os
import socket
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from megaresid.redaction import without_secrets


class UserError(Exception):
    """A mistake that the user can mend: one line that names the key or file, the value and the mend.

    ``rank_local`` marks what only one rank can see (a bad id in its batch): that rank then prints it,
    where a mistake that every rank sees is printed once on each machine.
    """

    def __init__(self, message: str, rank_local: bool = False):
        super().__init__(message)
        self.rank_local = rank_local


def suggestion(name: str, known: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest known one, or all of them."""
    known = sorted(known)
    nearest = get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"


def exits_with_user_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command's ``main``: a ``UserError`` becomes one line on stderr and exit code 2; a reader that closes
    the pipe ends the command without a word."""

    @functools.wraps(main)
    def command(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            if error.rank_local or os.environ.get("LOCAL_RANK", "0") == "0":
                where = "" if os.environ.get("RANK", "0") == "0" else f"{socket.gethostname()}: "
                print(f"error: {where}{_one_line(without_secrets(str(error)))}", file=sys.stderr, flush=True)
            sys.exit(2)
        except BrokenPipeError:  # whoever read the output has had enough of it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)

    return command


def _one_line(text: str) -> str:
    """With what would break the line, or move a terminal's cursor, written out as Python does: a name may hold it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
