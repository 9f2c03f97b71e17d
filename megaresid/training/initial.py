"""What a run started from, for ``initial.json``: its initial values and the order of its data, as digests.

Two runs of one seed share the order of their data, and the start of every parameter that both have: of one name and
shape, started by the same rule. Their digests say so bit for bit.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megaresid.data.mixture import RunData
from megaresid.model.init import Rule

SAMPLES = 4096
"""The first samples of a run, whose order is digested; all later ones come from the same function and inputs."""

Start = dict[str, Any]
"""Of one parameter: ``shape``, ``rule`` (how it is drawn) and ``sha256`` of its values."""


def parameter_starts(parameters: Mapping[str, torch.Tensor], rules: Mapping[str, Rule]) -> dict[str, Start]:
    """Of every parameter (by canonical name, whole: before ZeRO cuts it up) how it starts."""
    return {
        name: {
            "shape": list(parameter.shape),
            "rule": repr(rules[name].start),
            "sha256": hashlib.sha256(parameter.detach().cpu().contiguous().numpy()).hexdigest(),
        }
        for name, parameter in parameters.items()
    }


def data_order(data: RunData, context: int, global_batch: int, seed: int) -> dict[str, Any]:
    """What decides which tokens a run sees at which step, and a digest of its first ``SAMPLES`` samples' windows."""
    windows = data.sampler(context, seed).window_of(np.arange(SAMPLES, dtype=np.int64))
    return {
        "data": data.identity,
        "seed": seed,
        "context": context,
        "global_batch_size": global_batch,
        "samples": SAMPLES,
        "sha256": hashlib.sha256(np.ascontiguousarray(windows, dtype="<i8")).hexdigest(),
    }
