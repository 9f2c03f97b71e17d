"""The rules of every variant's parameters: the specification's numbers, and groups that partition the parameters."""

from fnmatch import fnmatchcase
from typing import NamedTuple

import pytest
import torch
from small_models import SHAPE
from variant_row import Row
from variant_table import ROWS

from megaresid.config import OptimizerOptions
from megaresid.model.gpt import GPT, canonical_parameters, canonical_rules
from megaresid.model.init import Rule
from megaresid.model.plan import ModelPlan
from megaresid.spec import parse_pattern
from megaresid.training.optimizer import parameter_groups


class Treatment(NamedTuple):
    """What the optimizer does with a parameter, and whether it must stay in fp32."""

    decay: bool
    lr_multiplier: float = 1.0
    fp32: bool = False
    epsilon_multiplier: float = 1.0


# The specification's one rule: what a site owns does not decay, except matrices that project the stream, which follow
# the body's. What enters a coefficient stays in fp32.
PLAIN = Treatment(decay=False)
MATRIX = Treatment(decay=True)
COEFFICIENT = Treatment(decay=False, fp32=True)
COEFFICIENT_MATRIX = Treatment(decay=True, fp32=True)

NORMS = {"norm*.weight": PLAIN, "norm*.bias": PLAIN}
GATE = {
    "*gate.fc.weight": MATRIX,
    "*gate.fc.bias": PLAIN,
    "*gate.proj.weight": COEFFICIENT_MATRIX,
    "*gate.proj.bias": COEFFICIENT,
}
DEPTH_SOFTMAX = {"depth.query": COEFFICIENT, "depth.key_scale": COEFFICIENT}
LOW_RANK = {"map.A.weight": MATRIX, "map.B.weight": MATRIX}
DELTA = {
    "rewrite.*.weight": COEFFICIENT_MATRIX,  # beta's and the target's projections
    "rewrite.*.bias": COEFFICIENT,
}
CONNECTIONS = {
    "A_m": COEFFICIENT,
    "A_r": COEFFICIENT,
    "B": COEFFICIENT,
    "s_a": COEFFICIENT,
    "s_b": COEFFICIENT,
    "W": COEFFICIENT_MATRIX,
    "stream_norm.weight": PLAIN,
    "stream_norm.bias": PLAIN,
}
MANIFOLD = {"phi": COEFFICIENT_MATRIX, "alpha": COEFFICIENT, "b": COEFFICIENT}

OWN = {
    "token_gate": GATE,
    "shared_token_gate": GATE,
    "channel_gate": GATE,
    "dense_former": {"average": COEFFICIENT},
    "mudd_former": {
        "aggregate.w1.weight": MATRIX,
        "aggregate.w2.weight": COEFFICIENT_MATRIX,
        "aggregate.static": COEFFICIENT,
    },
    "attention_residuals": DEPTH_SOFTMAX,
    "block_attention_residuals": DEPTH_SOFTMAX,
    "delta_attention_residuals": {**DEPTH_SOFTMAX, "depth.gamma": COEFFICIENT},
    "laurel_rw": {"logits": COEFFICIENT},
    "laurel_lr": LOW_RANK,
    "laurel_pa": {**LOW_RANK, "map.gamma": COEFFICIENT},
    "deep_delta": DELTA,
    "deep_delta_expanded": {**DELTA, "readout.weight": COEFFICIENT},  # one weight for each value channel: no projection
    "parallel_rescaled": {"scale": COEFFICIENT},
    "rezero": {"scale": COEFFICIENT},
    "skip_init": {"scale": COEFFICIENT},
    "layer_scale": {"scale": COEFFICIENT},
    "learned_scale": {"scale": COEFFICIENT},
    "adaptive_scale": {"base": COEFFICIENT, "strength": COEFFICIENT, "direction": COEFFICIENT_MATRIX},
    # Section 3: 5 to 10 times the learning rate for what multiplies x0, once for what multiplies through the depth.
    "x0_blend": {"residual_lambda": COEFFICIENT, "x0_lambda": COEFFICIENT._replace(lr_multiplier=5.0)},
    "backout": {"backout_lambda": COEFFICIENT},
    "unet": {"skip_logit": COEFFICIENT},
    "hyper_connections": CONNECTIONS,
    "frac_connections": CONNECTIONS,
    "mhc": MANIFOLD,
    "mhc_lite": MANIFOLD,
}

# Dey et al. 2025, table 1, in depth: m = layers / base_layers, of 4 layers here; learning rates of the blocks are
# multiplied by m^(alpha - 1), epsilons by m^-alpha.
BLOCKS = {
    "complete_p": (1.0, 2.0**-1),
    "complete_p(alpha=0.5, base_layers=1)": (4.0**-0.5, 4.0**-0.5),
}


def own_patterns(row: Row) -> dict[str, Treatment]:
    names = {component.name for _, component in parse_pattern(row.spec).terms}
    return NORMS | {glob: treatment for name in names for glob, treatment in OWN.get(name, {}).items()}


def local_name(name: str) -> str | None:
    """The name in its site, in the stream's opening or close, or among shared modules; None for the body's."""
    for prefix in ("head.", "shared.", "embed.opening."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name.split(".site.")[1] if ".site." in name else None


def built(row: Row) -> tuple[GPT, dict[str, Rule]]:
    with torch.device("meta"):
        model = GPT(ModelPlan(SHAPE, residual=row.spec))
    return model, canonical_rules(model, model.prefixes, model.plan)


def treatment_of(rule: Rule) -> Treatment:
    return Treatment(rule.decay, rule.lr_multiplier, rule.fp32, rule.epsilon_multiplier)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_rules_are_the_specifications(row):
    model, rules = built(row)
    assert rules.keys() == canonical_parameters(model, model.prefixes).keys()
    lr, epsilon = BLOCKS.get(row.spec, (1.0, 1.0))
    for name, rule in rules.items():
        if local := local_name(name):
            (expected,) = [t for glob, t in own_patterns(row).items() if fnmatchcase(local, glob)]
        else:
            expected = MATRIX if name.endswith(".weight") else PLAIN
        if name.startswith("layers."):
            expected = expected._replace(
                lr_multiplier=expected.lr_multiplier * lr, epsilon_multiplier=expected.epsilon_multiplier * epsilon
            )
        assert treatment_of(rule) == expected, name


def test_every_entry_of_the_table_is_some_variants_parameter():
    names = {component.name for row in ROWS for _, component in parse_pattern(row.spec).terms}
    unused = {(name, glob) for name, patterns in OWN.items() for glob in patterns}
    for row in ROWS:
        locals_ = {local for name in built(row)[1] if (local := local_name(name))}
        for _, component in parse_pattern(row.spec).terms:
            for glob in OWN.get(component.name, {}):
                if any(fnmatchcase(local, glob) for local in locals_):
                    unused.discard((component.name, glob))
    assert unused == set() and OWN.keys() <= names and BLOCKS.keys() <= {row.spec for row in ROWS}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_groups_partition_the_parameters_by_their_rules(row):
    model, rules = built(row)
    parameters = canonical_parameters(model, model.prefixes)
    assert {id(p) for p in parameters.values()} == {id(p) for p in model.parameters()}
    options = OptimizerOptions(learning_rate=0.5, weight_decay=0.25)
    groups = parameter_groups(parameters, rules, options, epsilon=1e-6)
    members = [id(p) for group in groups for p in group["params"]]
    assert sorted(members) == sorted(map(id, parameters.values()))
    group_of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in parameters.items():
        group, rule = group_of[id(parameter)], rules[name]
        found = group["weight_decay"], group["lr"], group["lr_multiplier"], group["eps"]
        expected = 0.25 * rule.decay, 0.5 * rule.lr_multiplier, rule.lr_multiplier, 1e-6 * rule.epsilon_multiplier
        assert found == pytest.approx(expected, rel=1e-12), name
