"""An exported model as the start of a training."""

from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from megaresid.exchange.folder import check_files, read_description
from megaresid.exchange.weights import Weights
from megaresid.training.checkpoint import agreed, check_shapes, shapes_of
from megaresid.training.zero_state import live_state


def copy_exported(engine, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """As ``copy_parameters`` of a checkpoint: set an engine's parameters, under any ZeRO stage, to those of an exported
    folder. Every rank calls it; ``UserError`` on all of them, before anything is changed, for a damaged folder."""
    what = f"exported model {folder}"
    shapes: list = [None] * dist.get_world_size()  # of a pipeline's rank those of its stage alone
    dist.all_gather_object(shapes, shapes_of(parameters))
    with agreed(what):
        live, description = live_state(engine, parameters), read_description(folder)
        check_shapes(str(folder), description.parameters, {name: of[name] for of in shapes for name in of})
        check_files(folder, description)
    with agreed(what), Weights(folder) as weights:

        def read(name: str, offset: int, out: Tensor) -> None:
            out.copy_(weights.read(name).view(-1)[offset : offset + out.numel()])

        live.restore_parameters(read)
    live.publish()
