"""What a run says it costs, against the table of variants."""

import json

import pytest
from made_sweeps import write_run

from megaresid.compare.accounting import counts
from megaresid.compare.comparison import compare
from megaresid.compare.runs import read_runs
from megaresid.model.describe import describe
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS


@pytest.mark.parametrize("residual", ["vanilla", "hyper_connections", "attention_residuals"])
def test_an_earlier_versions_run_is_counted_as_the_table_of_variants_counts(tmp_path, residual):
    changes = {"layers": 2, "width": 32, "heads": 2, "context": 16}
    plan = ModelPlan(PRESETS["tiny"].model_copy(update=changes), residual=residual)
    run = write_run(tmp_path / "a", residual=residual, parameters=None)
    (run / "spec.json").write_text(json.dumps(plan.tree() | {"hash": plan.hash}))
    parameters, flops = counts(read_runs([run]).runs[0])
    vanilla = write_run(tmp_path / "v", parameters=None)
    of_vanilla = ModelPlan(plan.shape)
    (vanilla / "spec.json").write_text(json.dumps(of_vanilla.tree() | {"hash": of_vanilla.hash}))
    parameters_of_vanilla, flops_of_vanilla = counts(read_runs([vanilla]).runs[0])
    table = describe(residual, plan.shape)
    assert parameters - parameters_of_vanilla == table.added_parameters
    assert flops - flops_of_vanilla == 3 * table.added_flops
    (variant,) = compare([run]).variants
    assert (variant.cost.parameters, variant.cost.flops_per_token) == (parameters, flops)


def test_a_model_that_cannot_be_made_again_is_told(tmp_path):
    write_run(tmp_path / "good")
    write_run(tmp_path / "unknown", residual="no_such_variant", parameters=None)
    lines = {problem.run: problem.line for problem in compare([tmp_path]).problems}
    assert "unknown residual 'no_such_variant'" in lines["unknown"]


def test_a_run_whose_layer_specs_are_another_models_is_told(tmp_path):
    write_run(tmp_path / "good", residual="vanilla")
    write_run(tmp_path / "other", residual="hyper_connections", parameters=None)
    lines = {problem.run: problem.line for problem in compare([tmp_path]).problems}
    assert "makes another model of it" in lines["other"]
