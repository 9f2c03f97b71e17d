"""Named parameter groups from the model's own rules, and the learning rate written into them before each step."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megaresid.config import OptimizerOptions
from megaresid.model.init import Rule


def parameter_groups(
    parameters: Mapping[str, nn.Parameter],
    rules: Mapping[str, Rule],
    options: OptimizerOptions,
    epsilon: float | None = None,
) -> list[dict]:
    """Groups for the optimizer, one for each (decay, multiplier of the learning rate, of epsilon) among the rules.

    ``parameters`` and ``rules`` go by canonical name; ``epsilon`` is the optimizer's, None where it has none of the
    Adam family's meaning. The groups partition the parameters (asserted): one that is in no group would silently never
    train, one that is in two would be updated twice.
    """
    groups: dict[tuple[bool, float, float], dict] = {}
    for name, parameter in parameters.items():
        rule = rules[name]
        key = rule.decay, rule.lr_multiplier, rule.epsilon_multiplier
        if key not in groups:
            scaled = "" if rule.epsilon_multiplier == 1 else f"-epsilon-x{rule.epsilon_multiplier:g}"
            groups[key] = {
                "name": f"{'decay' if rule.decay else 'no_decay'}-x{rule.lr_multiplier:g}{scaled}",
                "params": [],
                "lr": options.learning_rate * rule.lr_multiplier,
                "lr_multiplier": rule.lr_multiplier,
                "weight_decay": options.weight_decay if rule.decay else 0.0,
            }
            if epsilon is not None:
                groups[key]["eps"] = epsilon * rule.epsilon_multiplier
        groups[key]["params"].append(parameter)
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in parameters.values()}
    return list(groups.values())


def set_learning_rate(groups: list[dict], base: float) -> None:
    """Write ``base`` times each group's multiplier into the optimizer's live groups."""
    for group in groups:
        group["lr"] = base * group["lr_multiplier"]


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, fp32 []. Squares are summed in fp64, as DeepSpeed's stages 1 to 3 do: the
    fp32 sum over an embedding is 1e-4 off on a CPU."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return torch.stack(norms).norm().float() if norms else torch.zeros(())
