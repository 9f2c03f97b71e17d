"""Groups of all ranks beside the one that training uses."""

import torch.distributed as dist

_GROUPS: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def own_group(purpose: str) -> dist.ProcessGroup:
    """A gloo group of all ranks for one purpose, of which another thread, or what must not meet the others in their
    collectives, has need. Called by every rank. It is made once: a group has threads of its own, which stay."""
    of_all = dist.group.WORLD
    if purpose not in _GROUPS or _GROUPS[purpose][0] is not of_all:
        _GROUPS[purpose] = of_all, dist.new_group(backend="gloo")
    return _GROUPS[purpose][1]
