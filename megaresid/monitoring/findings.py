"""What a probe finds: numbers by depth, samples for histograms, matrices for heat maps."""

import math
import sys
from dataclasses import dataclass, field

import numpy as np

SUBLAYERS = ("attention", "mlp")
"""Of a layer, in their order."""
CLOSE = "close"
"""The place behind the last site, where the stream is closed."""


@dataclass(frozen=True)
class DepthMatrix:
    """How much each place takes of each source, averaged over tokens: ``weights[place][source]``."""

    weights: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """All of them, from the embeddings up; names that do not say where they stand come last."""
        return sorted(dict.fromkeys(source for row in self.weights.values() for source in row), key=_height)

    def array(self) -> np.ndarray:
        """fp64 [places, sources]; NaN where a place has no such source."""
        return np.array([[row.get(source, math.nan) for source in self.sources] for row in self.weights.values()])


def _height(source: str) -> tuple[int, int]:
    """Layer and sublayer where a source ends: of ``embed``, ``03.attention``, ``03.mlp``, ``03`` (the stream after
    that layer) and ``00.attention-02.mlp`` (a block)."""
    if source == "embed":
        return -1, 0
    layer, _, kind = source.rpartition("-")[2].partition(".")
    if not layer.isdigit():
        return sys.maxsize, 0
    return int(layer), SUBLAYERS.index(kind) if kind in SUBLAYERS else len(SUBLAYERS)


@dataclass(frozen=True)
class MixingMatrices:
    """The matrix of each place, averaged over tokens, fp64 [n, n], and the mean over tokens of their product, the last
    place's on the left; no product of matrices of different sizes."""

    by_place: dict[str, np.ndarray] = field(default_factory=dict)
    composite: np.ndarray | None = None


@dataclass
class Findings:
    """Of one probe, or of one step's gradient.

    ``by_depth`` has numbers by quantity and place: ``"03.attention"`` is a site, ``"03"`` a layer. ``streams`` has the
    RMS of each stream of a wide state by place. ``samples`` has values of each place for a histogram, by quantity.
    """

    by_depth: dict[str, dict[str, float]] = field(default_factory=dict)
    of_model: dict[str, float] = field(default_factory=dict)
    streams: dict[str, list[float]] = field(default_factory=dict)
    samples: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    depth: dict[str, DepthMatrix] = field(default_factory=dict)
    mixing: dict[str, MixingMatrices] = field(default_factory=dict)

    def note(self, quantity: str, place: str, value: float) -> None:
        self.by_depth.setdefault(quantity, {})[place] = float(value)

    def numbers(self) -> dict[str, float]:
        """Flat: ``"diagnostics/read_rms/03.attention"``."""
        found = {f"diagnostics/{name}": value for name, value in self.of_model.items()}
        for quantity, places in self.by_depth.items():
            found |= {f"diagnostics/{quantity}/{place}": value for place, value in places.items()}
        return found

    def tree(self) -> dict:
        """JSON-able, without the samples; a number that is not finite is null."""
        return {
            "of_model": _plain(self.of_model),
            "by_depth": _plain(self.by_depth),
            "streams": _plain(self.streams),
            "depth": {name: _plain(matrix.weights) for name, matrix in self.depth.items()},
            "mixing": {
                name: {
                    "by_place": {place: _plain(matrix.tolist()) for place, matrix in found.by_place.items()},
                    "composite": None if found.composite is None else _plain(found.composite.tolist()),
                }
                for name, found in self.mixing.items()
            },
        }


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value if math.isfinite(value) else None
