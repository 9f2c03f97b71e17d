"""ZeRO stage 3: each parameter is cut into equal runs, one a rank (the last padded), that stand behind each other in
the flat fp32 tensors of DeepSpeed's sub-groups; the module has its weights only while it computes."""

from collections.abc import Mapping

from torch import Tensor, nn

from megaresid.errors import UserError
from megaresid.training.zero_state.live import Fragment, LiveState


def live_state(zero, parameters: Mapping[str, nn.Parameter]) -> LiveState:
    """The state under DeepSpeed's stage 3 optimizer ``zero``; raises ``UserError`` for offload to NVMe or in part."""
    if zero.swap_optimizer or zero.params_in_nvme_and_cpu:
        raise UserError("zero_optimization: checkpoints cannot hold state that is offloaded to nvme; offload to cpu")
    if zero.offload_optimizer and zero.partial_offload != 1.0:
        raise UserError(f"zero_optimization.offload_optimizer.ratio is {zero.partial_offload}: checkpoints need 1.0")
    places = _places(zero)
    fragments = []
    for name, parameter in parameters.items():
        owner, start = places.get(parameter.ds_id, (parameter.ds_tensor, 0))
        run = parameter.partition_numel()
        offset = run * parameter.ds_zero_partition_rank
        length = max(0, min(run, parameter.ds_numel - offset))
        fragments.append(Fragment(name, min(offset, parameter.ds_numel), length, owner, start))

    def publish() -> None:
        zero.checkpoint_event_prologue()  # drops the gathered copies that small parameters keep between steps
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero.checkpoint_event_epilogue()  # gathers them again, from the new values

    return LiveState(fragments, zero.optimizer, publish)


def _places(zero) -> dict[int, tuple[Tensor, int]]:
    """Where the run of each trained parameter (by DeepSpeed's id) stands: its flat fp32 tensor and the start there."""
    places = {}
    for group, owner in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
        start = 0
        for parameter in group:
            places[parameter.ds_id] = (owner, start)
            start += parameter.partition_numel()
    return places
