"""ZeRO stages 1 and 2: each group's parameters are flattened into one buffer, of which a rank owns one fp32 part.

DeepSpeed links each parameter that reaches into this rank's part to its run there (``_hp_mapping``, None where it
does not reach), for its ZeRO optimizer and for the ``BF16_Optimizer`` that it takes for bf16 at stage 1 alike.
"""

from collections.abc import Mapping

from torch import nn

from megaresid.training.zero_state.live import Fragment, LiveState, replicated


def live_state(zero, parameters: Mapping[str, nn.Parameter]) -> LiveState:
    """The state under DeepSpeed's optimizer ``zero``, with parameters that are not trained as they are."""
    parts = [group["params"][0] for group in zero.optimizer.param_groups]
    fragments = []
    for name, parameter in parameters.items():
        if not hasattr(parameter, "_hp_mapping"):
            fragments.append(replicated(name, parameter))
        elif (link := parameter._hp_mapping) is not None:
            run, place = link.lp_fragment_address, link.hp_fragment_address
            part = parts[link.param_group_index]
            fragments.append(Fragment(name, run.start, run.numel, part, place.start))

    def publish() -> None:
        zero.update_lp_params()
        # The links to state tensors are made once, after the first step: those to tensors made here are due now.
        zero._hp_optimizer_states_linked = False
        if any(zero.optimizer.state.get(part) for part in parts):
            zero._lazy_init_hp_params_optimizer_state()

    return LiveState(fragments, zero.optimizer, publish)
