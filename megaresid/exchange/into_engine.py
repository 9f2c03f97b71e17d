"""An exported model as the start of a training."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from megaresid.exchange.folder import check_files, read_description
from megaresid.exchange.weights import Weights
from megaresid.training.checkpoint import agreed, check_shapes, shapes_of
from megaresid.training.zero_state import live_state


def copy_exported(engine, parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """As ``copy_parameters`` of a checkpoint: set an engine's parameters, under any ZeRO stage, to those of an exported
    folder. Every rank calls it; ``UserError`` on all of them, before anything is changed, for a damaged folder."""
    what = f"exported model {folder}"
    with agreed(what):
        live, description = live_state(engine, parameters), read_description(folder)
        check_shapes(str(folder), description.parameters, shapes_of(parameters))
        check_files(folder, description)
    with agreed(what), Weights(folder) as weights:

        def read(name: str, offset: int, out: Tensor) -> None:
            out.copy_(weights.read(name).view(-1)[offset : offset + out.numel()])

        live.restore_parameters(read)
    live.publish()
