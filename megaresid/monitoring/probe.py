"""A probe: one forward of a few fixed sequences, of which the stream, the sites and the mixers are looked at.

Every number is that of one token, averaged over all tokens of the probe. The RMS of a token is over all its channels
(and streams, and inputs q, k, v where there are several). A place is a site: layer and kind.

- ``read_rms``: of what a site reads: the input of its norm, or its sublayer's where the norm stands behind it; of the
  close, the input of the final norm.
- ``update_rms``: of what the sublayers' outputs change in the state: the state after the site, less what the site
  makes of outputs of zero, gates and norms behind the sublayer included. Of several tensors, the one changed most.
- ``update_ratio``: the second by the first.
- ``cosine``: between what the first site of a layer reads and what that of the next layer reads, the close last (of a
  layer; one less ShortGPT's block influence, Men et al. 2024, arXiv 2403.03853).
- ``effective_depth``: exp of the entropy of the sites' shares in the sum of their ``update_rms``: 1 where one site
  makes all of the update, the number of sites where all make as much.
- ``stream_spread``: of a wide state H [n, C]: the RMS of H around the mean of its streams, by the RMS of H.

And what sites and the close (``site.NAME``) and mixers (``mixer.NAME``) show of themselves, of the kinds in
``megaresid.readings``. Of ``Values``: mean, least (``NAME_min``) and largest (``NAME_max``). Of ``Mixing``: the largest
absolute sum of a row (what a signal can grow to going forward) and of a column (a gradient, going back), of each
site's matrix and of the product of all up to it: the gains of Xie et al. 2025, arXiv 2512.24880, section 3.1.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megaresid.errors import UserError
from megaresid.model.gpt import GPT
from megaresid.model.layer import Layer
from megaresid.monitoring.findings import CLOSE, DepthMatrix, Findings, MixingMatrices
from megaresid.readings import Depth, Mixing, Reading, Values
from megaresid.residual.stream import Close, Site

SAMPLES = 4096
"""The most values of one place that go into a histogram; of more it is a sample, the same ones each time."""

Whole = Callable[[Iterable[nn.Parameter]], AbstractContextManager]
"""Has these parameters whole while a block runs."""


@torch.no_grad()
def probe(model: GPT, idx: Tensor, whole: Whole = lambda _: nullcontext()) -> Findings:
    """What a model in evaluation mode does with ``idx``, int64 [m, T] on its device, without the output head."""
    with Looking(model) as looking, whole(model.shared.parameters()):
        x = idx
        for part in model.parts:
            with whole(part.parameters()):
                x = part(x)
    return looking.findings


class Looking:
    """Hooks on a model's sites, sublayers and close while the block runs, and what they have found by its end."""

    def __init__(self, model: GPT):
        self.findings = Findings()
        self._parts = model.parts
        self._handles: list = []
        self._reads: list[Tensor] = []
        self._entered = True
        """Whether the current site has called its sublayer; what it had read before that is what it reads."""
        self._of_layer: tuple[str, Tensor] | None = None
        self._products: dict[str, Tensor | None] = {}
        self._looking = False
        self._failure: Exception | None = None

    def __enter__(self) -> "Looking":
        for index, part in enumerate(part for part in self._parts if isinstance(part, Layer)):
            self._look_at_layer(f"{index:02d}", part)
        close = self._parts[-1]
        self._before(close, self._closing)
        self._before(close.norm, self._read)
        self._after(close, self._closed)
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for handle in self._handles:
            handle.remove()
        if kind is None:
            if self._failure:
                raise self._failure
            self._conclude()

    def _before(self, module: nn.Module, look: Callable[[nn.Module, tuple], None]) -> None:
        self._handles.append(module.register_forward_pre_hook(self._guarded(look)))

    def _after(self, module: nn.Module, look: Callable[[nn.Module, tuple, Any], None]) -> None:
        self._handles.append(module.register_forward_hook(self._guarded(look)))

    def _guarded(self, look: Callable[..., None]) -> Callable[..., None]:
        """What a look runs itself, such as a site once more, is not looked at.

        A look that fails is the last one, but the forward goes on: under ZeRO-3 the other ranks take part in it.
        """

        def guarded(*arguments) -> None:
            if self._looking or self._failure:
                return
            self._looking = True
            try:
                look(*arguments)
            except Exception as error:
                self._failure = error
            self._looking = False

        return guarded

    def _look_at_layer(self, layer: str, part: Layer) -> None:
        for number, (kind, site) in enumerate(part.sites.items()):
            place = f"{layer}.{kind}"
            self._before(site, self._entering(place))
            for norm in _leaves(getattr(site, "norm", None)):
                self._before(norm, self._read)
            self._after(site, self._leaving(place, layer if number == 0 else None))
        self._before(part.attention, self._sublayer(f"{layer}.attention"))
        self._before(part.mlp, self._sublayer(None))

    def _entering(self, place: str):
        def look(site: Site, arguments: tuple) -> None:
            state, *_ = arguments
            self._look_at_streams(place, state[0])
            self._keep(place, "site", site.diagnose(state))
            self._reads, self._entered = [], False

        return look

    def _read(self, norm: nn.Module, arguments: tuple) -> None:
        if not self._entered:
            self._reads.append(arguments[0])

    def _sublayer(self, place: str | None):
        def look(module: nn.Module, arguments: tuple) -> None:
            x, side = arguments
            if place:
                self._keep(place, "mixer", module.diagnose(x, side))
            if not self._entered and not self._reads:
                self._reads = [*x] if isinstance(x, tuple) else [x]
            self._entered = True

        return look

    def _leaving(self, place: str, first_of: str | None):
        def look(site: Site, arguments: tuple, output: tuple) -> None:
            (state, side, *sublayers), (after, _) = arguments, output
            read = _side_by_side(self._reads)
            without, _ = site.forward(state, side, *[_nothing] * len(sublayers))
            changes = [_rms(a - b, 2) for a, b in zip(map(_exact, after), map(_exact, without)) if a is not b]
            update = max(changes, key=lambda change: change.mean().item())
            rms = _rms(read, 2)
            note = self.findings.note
            note("read_rms", place, rms.mean())
            note("update_rms", place, update.mean())
            note("update_ratio", place, (update / rms.clamp(min=torch.finfo(rms.dtype).tiny)).mean())
            if first_of:
                self._next_layer(first_of, read)

        return look

    def _next_layer(self, layer: str, read: Tensor) -> None:
        if self._of_layer:
            before, theirs = self._of_layer
            # Inputs q, k and v of a site stand side by side; where only one layer has them, the other's is as each.
            self.findings.note("cosine", before, torch.cosine_similarity(theirs, read, dim=-1).mean())
        self._of_layer = layer, read

    def _closing(self, close: Close, arguments: tuple) -> None:
        state = arguments[0][: close.state_length]
        self._look_at_streams(CLOSE, state[0])
        self._keep(CLOSE, "site", close.diagnose(state))
        self._reads, self._entered = [], False

    def _closed(self, close: Close, arguments: tuple, output: Tensor) -> None:
        if self._reads:
            read = _side_by_side(self._reads)
            self.findings.note("read_rms", CLOSE, _rms(read, 2).mean())
            self._next_layer(CLOSE, read)

    def _look_at_streams(self, place: str, state: Tensor) -> None:
        if state.ndim != 4:
            return
        streams = _exact(state)
        spread = _rms(streams - streams.mean(2, keepdim=True), 2) / _rms(streams, 2)
        self.findings.note("stream_spread", place, spread.mean())
        self.findings.streams[place] = _rms(streams, 3).mean((0, 1)).tolist()

    def _keep(self, place: str, whose: str, readings: Mapping[str, Reading]) -> None:
        if not isinstance(readings, Mapping):
            raise UserError(f"diagnose of {place} gives a {type(readings).__name__}, no mapping of readings by name")
        for local, reading in readings.items():
            name = f"{whose}.{local}"
            match reading:
                case Values(values):
                    self._keep_values(name, place, _exact(values))
                case Depth(weights, sources):
                    mean = _exact(weights).flatten(0, -2).mean(0) if weights.ndim > 1 else _exact(weights)
                    row = dict(zip(sources, mean.tolist(), strict=True))
                    self.findings.depth.setdefault(name, DepthMatrix()).weights[place] = row
                case Mixing(matrix):
                    self._keep_mixing(name, place, matrix.double())
                case _:
                    kind = type(reading).__name__
                    raise UserError(f"diagnose of {place}: {local} is a {kind}, none of those in megaresid.readings")

    def _keep_values(self, name: str, place: str, values: Tensor) -> None:
        values = values.flatten()
        self.findings.note(name, place, values.mean())
        if len(values) > 1:
            self.findings.note(f"{name}_min", place, values.min())
            self.findings.note(f"{name}_max", place, values.max())
        if len(values) > SAMPLES:
            # At random, since equal steps through [B, T, heads] could meet one head alone.
            chosen = torch.randint(len(values), (SAMPLES,), generator=torch.Generator().manual_seed(0))
            values = values[chosen.to(values.device)]
        self.findings.samples.setdefault(name, {})[place] = values.float().cpu().numpy()

    def _keep_mixing(self, name: str, place: str, matrix: Tensor) -> None:
        known = self.findings.mixing.setdefault(name, MixingMatrices())
        known.by_place[place] = _mean_matrix(matrix)
        self._note_gains(name, place, matrix)
        before = self._products.get(name, torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device))
        fits = before is not None and before.shape[-1] == matrix.shape[-1]
        self._products[name] = matrix @ before if fits else None  # in fp64, which autocast leaves alone
        if fits:
            self._note_gains(f"{name}_product", place, self._products[name])

    def _note_gains(self, name: str, place: str, matrix: Tensor) -> None:
        self.findings.note(f"{name}_row_gain", place, matrix.sum(-1).abs().amax(-1).mean())
        self.findings.note(f"{name}_column_gain", place, matrix.sum(-2).abs().amax(-1).mean())

    def _conclude(self) -> None:
        found = self.findings
        for name, product in self._products.items():
            if product is not None:
                found.mixing[name] = MixingMatrices(found.mixing[name].by_place, _mean_matrix(product))
        updates = found.by_depth.get("update_rms")
        if updates:
            found.of_model["effective_depth"] = effective_number(updates.values())


def effective_number(amounts: Iterable[float]) -> float:
    """exp of the entropy of the amounts' shares in their sum; NaN where that is zero."""
    amounts = np.array([*amounts])
    if not amounts.sum() > 0:
        return math.nan
    shares = amounts[amounts > 0] / amounts.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _nothing(x: Tensor | tuple[Tensor, ...], side: Any) -> tuple[Tensor, Any]:
    """A sublayer that gives zeros."""
    return torch.zeros_like(x[0] if isinstance(x, tuple) else x), side


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _side_by_side(inputs: list[Tensor]) -> Tensor:
    """[B, T, inputs, C]."""
    return torch.stack([*map(_exact, inputs)], dim=2)


def _rms(x: Tensor, first: int) -> Tensor:
    """Over the dimensions from ``first`` on."""
    return x.flatten(first).square().mean(-1).sqrt()


def _mean_matrix(matrix: Tensor) -> np.ndarray:
    return matrix.reshape(-1, *matrix.shape[-2:]).mean(0).cpu().numpy()


def _leaves(norm: nn.Module | None) -> list[nn.Module]:
    """The norm itself, or those that it holds, one for each input."""
    return [] if norm is None else [module for module in norm.modules() if not any(module.children())]
