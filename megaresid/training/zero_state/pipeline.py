"""A stage of a pipeline: its own parameters only, replicated or cut up over the ranks of this stage."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from megaresid.training.zero_state.live import Fragment, LiveState


@dataclass(frozen=True)
class StageState(LiveState):
    """The state of a rank that is the ``data_rank``-th of the ``data_ranks`` of its stage. Parameters named in
    ``elsewhere`` are copies of an earlier stage's, which writes them; all are restored."""

    data_rank: int
    data_ranks: int
    elsewhere: frozenset[str]

    def tensors(self, rank: int, ranks: int) -> Iterator[tuple[str, Fragment, Tensor]]:
        own = replace(self, fragments=[fragment for fragment in self.fragments if fragment.name not in self.elsewhere])
        yield from LiveState.tensors(own, self.data_rank, self.data_ranks)


def live_state(stage: LiveState, engine, parameters) -> StageState:
    """``stage`` as the part of a pipeline that DeepSpeed's ``engine`` has of it."""
    copies = (name for name, parameter in parameters.items() if parameter.ds_pipe_replicated)
    return StageState(
        stage.fragments,
        stage.optimizer,
        stage.publish,
        data_rank=engine.grid.get_data_parallel_id(),
        data_ranks=engine.grid.get_data_parallel_world_size(),
        elsewhere=frozenset(copies),
    )
