"""Windows that begin with a document, without an index of the documents."""

from pathlib import Path

import numpy as np

from megaresid.data.shards import TOKEN, TokenStream


class AlignedStream:
    """A stream whose window w begins at the first <|endoftext|> among tokens [w*context, (w+1)*context).

    Where none is there, or less than a window is left behind it, the window begins at w*context, as it would in a
    plain stream. So there are as many windows as in a plain stream, all begin at different tokens, and none leaves
    the stream; of a document that begins further on in the same tokens, or goes on behind the window, some tokens may
    be in no window, and others are in two.
    """

    def __init__(self, stream: TokenStream, end_of_text: int):
        self.stream, self.end_of_text = stream, end_of_text

    def __len__(self) -> int:
        return len(self.stream)

    def read_windows(self, windows: np.ndarray, context: int) -> np.ndarray:
        """uint16[len(windows), context + 1]: the inputs and the token behind them."""
        tokens = np.empty((len(windows), context + 1), dtype=TOKEN)
        for row, window in zip(tokens, windows.tolist(), strict=True):
            read, start = self._read(window, context)
            row[:] = read[start : start + context + 1]
        return tokens

    def place(self, window: int, column: int, context: int) -> tuple[Path, int]:
        """(shard, token offset within it) of a token of a window."""
        _, start = self._read(window, context)
        return self.stream.locate(window * context + start + column)

    def start(self, window: int, context: int) -> int:
        """The position in the stream of a window's first token."""
        return window * context + self._read(window, context)[1]

    def _read(self, window: int, context: int) -> tuple[np.ndarray, int]:
        """The tokens from window*context on that the window can reach, and where among them it begins."""
        first = window * context
        tokens = self.stream.read(first, min(2 * context, len(self.stream) - first))
        # argmax of nothing found is 0, and so is the start then.
        start = int((tokens[:context] == self.end_of_text).argmax())
        return tokens, start if start + context < len(tokens) else 0
