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
        reach, starts = self._read(windows, context)
        tokens = np.empty((len(windows), context + 1), dtype=TOKEN)
        for row, read, start in zip(tokens, reach, starts.tolist(), strict=True):
            row[:] = read[start : start + context + 1]
        return tokens

    def place(self, window: int, column: int, context: int) -> tuple[Path, int]:
        """(shard, token offset within it) of a token of a window."""
        return self.stream.locate(self.start(window, context) + column)

    def start(self, window: int, context: int) -> int:
        """The position in the stream of a window's first token."""
        _, (start,) = self._read(np.array([window]), context)
        return window * context + int(start)

    def _read(self, windows: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that each window can reach, uint16[n, 2*context] from window*context on, and where among them it
        begins, int64[n]. What lies behind the end of the stream is not set."""
        reach = np.empty((len(windows), 2 * context), dtype=TOKEN)
        left = len(self.stream) - windows * context
        for row, window, present in zip(reach, windows.tolist(), left.tolist(), strict=True):
            self.stream.read_into(window * context, row[:present])
        # argmax of a row without a document is 0, where the plain window begins.
        starts = (reach[:, :context] == self.end_of_text).argmax(axis=1)
        return reach, np.where(starts + context < left, starts, 0)
