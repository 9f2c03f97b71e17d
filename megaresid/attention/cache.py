"""What a mixer carries from one call to the next while a text is generated."""

import torch


class Cache:
    """Of one mixer: tensors by name, which it replaces or fills at every call, and the caches of the mixers inside it.

    Empty at the start of a text. ``length`` is the most tokens that will be seen.
    """

    def __init__(self, length: int):
        self.length = length
        self.tensors: dict[str, torch.Tensor] = {}
        self._inner: dict[str, Cache] = {}

    def inside(self, name: str) -> "Cache":
        """The cache of a mixer or convolution inside this one."""
        return self._inner.setdefault(name, Cache(self.length))

    def bytes(self) -> int:
        """Memory of all that is carried."""
        own = sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())
        return own + sum(inner.bytes() for inner in self._inner.values())


class ModelCache:
    """Of a whole model: how many tokens it has seen, the document of the last one [B], and every layer's cache."""

    def __init__(self, layers: int, length: int):
        self.position = 0
        self.document: torch.Tensor | None = None
        self.layers = [Cache(length) for _ in range(layers)]
