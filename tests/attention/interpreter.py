"""Triton's interpreter: flash-linear-attention's kernels, run on CPU tensors by numpy.

It needs two changes of Triton's and fla's insides, seen with Triton 3.9.0 and fla 0.6.0. They are made in a process of
its own, so that nothing else sees them. bf16 is silently wrong there: never use it.
"""

import builtins
import importlib.util
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

MISSING = [name for name in ("triton", "fla") if importlib.util.find_spec(name) is None]
REASON = f"needs {' and '.join(MISSING)}"


class Interpreter:
    """A process that interprets kernels: ``run(function, ...)`` calls there, as a pool does. fla is loaded once."""

    def __init__(self):
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start)

    def run(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        return self._pool.submit(_interpreted, function, arguments, keywords).result()

    def close(self) -> None:
        self._pool.shutdown()


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def first(self, arguments):
        """One configuration, because to choose the fastest asks a GPU."""
        return prune(self, arguments)[:1] if self.early_config_prune else self.configs[:1]

    Autotuner.prune_configs = first


def _interpreted(function: Callable[..., Any], arguments: tuple, keywords: dict[str, Any]) -> Any:
    import fla.ops

    del fla
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops."):
            vars(module).setdefault("range", _range)
    return function(*arguments, **keywords)


class _Index(int):
    """A loop's counter, which a compiled kernel may ask for another integer type."""

    def to(self, *_: Any, **__: Any) -> "_Index":
        return self


def _range(*bounds: Any):
    return map(_Index, builtins.range(*map(_plain, bounds)))


def _plain(bound: Any) -> int:
    """A bound as a number: it may be a scalar of the interpreter or a constant of the kernel."""
    if hasattr(bound, "handle"):
        return int(bound.handle.data.item())
    return int(getattr(bound, "value", bound))
