"""The state of a live DeepSpeed engine as runs of elements of named parameters, whatever the ZeRO stage."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megaresid.errors import UserError

PARAMETER = "parameter"
"""The kind of an fp32 parameter; the other kinds are the optimizer's own keys (``exp_avg``, ...)."""


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's elements that this rank holds.

    Elements ``offset`` to ``offset + length`` of the flattened parameter stand from ``start`` on in the flattened
    ``owner``, the contiguous tensor that the optimizer updates. ``replicated``: every rank holds the same run.
    """

    name: str
    offset: int
    length: int
    owner: Tensor
    start: int
    replicated: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The run's view, [length], into ``tensor``: the owner or a state tensor laid out like it."""
        return tensor.detach().view(-1).narrow(0, self.start, self.length)

    def share(self, rank: int, ranks: int) -> "Fragment":
        """What this rank writes: of a replicated run an even share, of any other run all of it."""
        if not self.replicated:
            return self
        begin, end = self.length * rank // ranks, self.length * (rank + 1) // ranks
        return replace(self, offset=self.offset + begin, length=end - begin, start=self.start + begin)


def replicated(name: str, parameter: Tensor) -> Fragment:
    """The whole of a parameter that every rank holds."""
    return Fragment(name, 0, parameter.numel(), parameter, 0, replicated=True)


class Saved(Protocol):
    """What a checkpoint answers about its parameters' optimizer state."""

    def kinds(self, name: str) -> Mapping[str, torch.dtype]: ...

    def scalars(self, name: str) -> Mapping[str, int | float]: ...

    def read(self, kind: str, name: str, offset: int, out: Tensor) -> None: ...


@dataclass(frozen=True)
class LiveState:
    """This rank's part of parameters and optimizer state.

    ``publish`` brings the module's own weights up to date after the owners were written; every rank calls it.
    """

    fragments: list[Fragment]
    optimizer: torch.optim.Optimizer
    publish: Callable[[], None]

    def tensors(self, rank: int, ranks: int) -> Iterator[tuple[str, Fragment, Tensor]]:
        """(kind, fragment, its elements as a flat view) of all that this rank writes to a checkpoint."""
        for fragment in self.fragments:
            share = fragment.share(rank, ranks)
            if share.length == 0:
                continue
            yield PARAMETER, share, share.of(share.owner).float()
            for key, value in self.optimizer.state.get(share.owner, {}).items():
                if _elementwise(key, value, share):
                    yield key, share, share.of(value)

    def scalars(self) -> dict[str, dict[str, int | float]]:
        """The optimizer's numbers, such as AdamW's ``step``, by parameter and key."""
        found: dict[str, dict[str, int | float]] = {}
        for fragment in self.fragments:
            for key, value in self.optimizer.state.get(fragment.owner, {}).items():
                if value is not None and not _elementwise(key, value, fragment):
                    found.setdefault(fragment.name, {})[key] = _number(value)
        return found

    def restore_parameters(self, read: Callable[[str, int, Tensor], None]) -> None:
        """Have ``read(name, offset, out)`` fill every run of this rank; ``publish`` is the caller's next call."""
        for fragment in self.fragments:
            read(fragment.name, fragment.offset, fragment.of(fragment.owner))

    def owned_scalars(self, saved: Saved) -> dict[Tensor, dict[str, int | float]]:
        """The saved scalars for each owner. A parameter that was saved without any (it had never had a gradient, and
        its state is zero) follows the others of its owner; ``UserError`` where those were saved at different steps."""
        owned: dict[Tensor, dict[str, int | float]] = {}
        for fragment in self.fragments:
            common = owned.setdefault(fragment.owner, {})
            for key, number in saved.scalars(fragment.name).items():
                if common.setdefault(key, number) != number:
                    raise UserError(
                        f"optimizer state {key!r} is {number} for {fragment.name} and {common[key]} for others that "
                        "this ZeRO stage updates together with it: resume with the stage of the checkpoint"
                    )
        return owned

    def restore_optimizer(self, saved: Saved) -> None:
        """Make the optimizer's state that of the checkpoint, creating what its first step would create."""
        for owner, numbers in self.owned_scalars(saved).items():
            fragments = [fragment for fragment in self.fragments if fragment.owner is owner]
            kinds = {kind: dtype for f in fragments for kind, dtype in saved.kinds(f.name).items() if kind != PARAMETER}
            if not kinds and not numbers and owner not in self.optimizer.state:
                continue
            state = self.optimizer.state[owner]
            for stale in set(state) - set(kinds):
                del state[stale]
            for kind, dtype in kinds.items():
                if not isinstance(state.get(kind), Tensor):
                    state[kind] = torch.zeros_like(owner, dtype=dtype, requires_grad=False)
                for fragment in fragments:
                    if kind in saved.kinds(fragment.name):
                        saved.read(kind, fragment.name, fragment.offset, fragment.of(state[kind]))
                    else:
                        fragment.of(state[kind]).zero_()
            for key, number in numbers.items():
                state[key] = self._scalar(number, owner)

    def _scalar(self, number: int | float, owner: Tensor) -> Tensor | int | float:
        # torch's optimizers count in tensors, DeepSpeed's in Python numbers, and neither takes the other's.
        if not type(self.optimizer).__module__.startswith("torch.optim"):
            return number
        on_device = any(group.get("capturable") or group.get("fused") for group in self.optimizer.param_groups)
        return torch.tensor(float(number), device=owner.device if on_device else "cpu")


def _elementwise(key: str, value: object, fragment: Fragment) -> bool:
    """Whether a state has a value for each element (DeepSpeed refuses parameters without dimensions)."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return False
    if value.shape != fragment.owner.shape:
        raise UserError(
            f"optimizer state {key!r} of {fragment.name} has shape {tuple(value.shape)}, not the "
            f"{tuple(fragment.owner.shape)} of what it belongs to: use an optimizer whose state has a value an element"
        )
    return True


def _number(value: Tensor | int | float) -> int | float:
    number = value.item() if isinstance(value, Tensor) else value
    return int(number) if number == int(number) else number
