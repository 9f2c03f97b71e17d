"""The comparison of whole sweeps, written by hand, against what was written into them."""

import json

import numpy as np
import pytest
from made_sweeps import BATCH, CONTEXT, START, STEPS, curve, write_run, write_sweep
from scipy import stats

from megaresid.compare.comparison import compare
from megaresid.compare.results import Comparison
from megaresid.errors import UserError

A = [3.200, 3.212, 3.195]
B = [3.150, 3.166, 3.143]


def by_name(comparison):
    return {variant.name: variant for variant in comparison.variants}


def lines(comparison):
    return {problem.run: problem.line for problem in comparison.problems}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("two")
    write_sweep(
        folder,
        {"vanilla": {1e-3: A, 3e-3: [3.3, 3.3, 3.3]}, "better": {1e-3: [3.4, 3.4, 3.4], 3e-3: B}},
        tokens_per_second={"vanilla": 1000.0, "better": 800.0},
        flops_per_token={"vanilla": 6_000_000, "better": 7_500_000},
        parameters={"vanilla": 1_000_000, "better": 1_000_100},
        metrics={"lambada/token_ppl": 33.0, "arc_easy/acc": 0.5, "arc_easy/acc_stderr": 0.1, "my:hook/x": 1.0},
    )
    return compare([folder])


def test_losses_and_differences_are_those_written(two):
    vanilla, better = two.variants
    assert (vanilla.name, better.name, two.baseline) == ("vanilla", "better", "vanilla")
    assert (vanilla.learning_rate, better.learning_rate) == (1e-3, 3e-3)
    assert [sample.value for sample in better.loss.samples] == B
    assert [(s.seed, s.source.run, s.source.step) for s in better.loss.samples] == [
        (seed, f"runs/better-0.003-{seed}", STEPS) for seed in (1, 2, 3)
    ]
    test = stats.ttest_rel(B, A)
    assert vanilla.difference is None
    assert better.difference.mean == pytest.approx(np.mean(B) - np.mean(A))
    assert better.difference.p_t == better.difference.p_holm == pytest.approx(test.pvalue)
    assert better.difference.p_permutation == 0.25 and better.difference.seeds == (1, 2, 3)
    assert better.difference.verdict == "better" and two.refusal is None
    assert [(rate.learning_rate, rate.loss.mean) for rate in better.rates] == [
        (1e-3, pytest.approx(3.4)),
        (3e-3, pytest.approx(np.mean(B))),
    ]
    assert better.at_edge and vanilla.at_edge


def test_cost_is_the_median_of_the_rows(two):
    vanilla, better = two.variants
    assert (better.cost.parameters, better.cost.flops_per_token) == (1_000_100, 7_500_000)
    assert better.cost.tokens_per_second.mean == 800 and vanilla.cost.tokens_per_second.mean == 1000
    assert better.cost.step_seconds.mean == pytest.approx(BATCH * CONTEXT / 800)
    assert better.cost.step_ratio == pytest.approx(1.25) and vanilla.cost.step_ratio == 1
    assert better.cost.mfu is None and better.cost.memory_bytes.mean == 900_000_000


def test_losses_at_equal_cost_are_read_off_the_curves(two):
    vanilla, better = two.variants
    tokens = STEPS * BATCH * CONTEXT
    assert (two.budget.tokens, two.budget.flops) == (tokens, tokens * 6e6)
    assert two.budget.seconds == pytest.approx(tokens / 1000)
    assert vanilla.equal.seconds.mean == pytest.approx(np.mean(A)) == vanilla.equal.flops.mean
    assert better.equal.tokens.mean == pytest.approx(np.mean(B))
    # At 80% of its steps, where there is a validation.
    at = [curve(loss, 0.8) for loss in B]
    assert better.equal.flops.mean == better.equal.seconds.mean == pytest.approx(np.mean(at))
    assert better.equal.flops.samples[0].source.step == 0.8 * STEPS
    assert two.orders.tokens == ("better", "vanilla") and two.orders.flops == two.orders.tokens


def test_between_two_validations_the_curve_is_straight_and_orders_that_differ_are_told(tmp_path):
    speeds = {"vanilla": 1000.0, "slow": 250.0}
    write_sweep(tmp_path, {"vanilla": A, "slow": B}, tokens_per_second=speeds, every=30)
    found = compare([tmp_path])
    slow = by_name(found)["slow"]
    expected = np.mean([curve(loss, 0.3) + (START - curve(loss, 0.3)) * (30 - 25) / 30 for loss in B])
    assert slow.equal.seconds.mean == pytest.approx(expected)
    assert slow.equal.seconds.samples[0].source.step == 30
    assert found.orders.tokens == found.orders.flops == ("slow", "vanilla")
    assert found.orders.seconds == ("vanilla", "slow")
    assert "slow is ahead of vanilla at equal tokens and FLOPs, behind it at equal time" in found.orders.remark
    assert any("planned to end there" in note for note in found.notes)


def test_metrics_are_compared_by_their_own_direction(two):
    better = two.variants[1]
    assert [(metric.name, metric.better) for metric in better.metrics] == [
        ("arc_easy/acc", "higher"),
        ("lambada/token_ppl", "lower"),
    ]
    assert all(metric.difference.verdict == "not distinguishable" for metric in better.metrics)
    assert any("my:hook/x" in note for note in two.notes)


def test_a_higher_accuracy_is_better(tmp_path):
    for seed, (loss, accuracy) in enumerate(zip(A, (0.50, 0.51, 0.49)), 1):
        write_run(tmp_path / f"v{seed}", seed=seed, loss=loss, metrics={"arc_easy/acc": accuracy})
        more = accuracy + 0.2 + seed / 1000
        write_run(tmp_path / f"o{seed}", seed=seed, loss=loss + 0.1, residual="other", metrics={"arc_easy/acc": more})
    metric = by_name(compare([tmp_path]))["other"].metrics[0]
    assert metric.difference.verdict == "better" and metric.difference.mean == pytest.approx(0.202)


def test_seeds_are_paired_and_not_only_averaged(tmp_path):
    """A difference far below the noise between seeds, the same in each seed."""
    write_sweep(tmp_path, {"vanilla": [3.0, 3.3, 3.7], "other": [3.0011, 3.3010, 3.7012]})
    other = by_name(compare([tmp_path]))["other"]
    assert other.difference.verdict == "worse" and other.difference.p_t < 0.01


def test_several_variants_are_corrected_together(tmp_path):
    write_sweep(tmp_path, {"vanilla": A, **{name: list(np.add(B, i / 100)) for i, name in enumerate("abcd")}})
    found = by_name(compare([tmp_path]))
    p = sorted(found[name].difference.p_t for name in "abcd")
    assert min(found[name].difference.p_holm for name in "abcd") == pytest.approx(min(1, 4 * p[0]))


def test_one_seed_says_that_it_says_nothing(tmp_path):
    write_sweep(tmp_path, {"vanilla": [3.2], "other": [3.1]})
    found = compare([tmp_path])
    difference = by_name(found)["other"].difference
    assert difference.verdict == "too few seeds" and difference.p_holm is None
    assert any("one seed nothing can be said" in note for note in found.notes)


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"data": {"identity": "6" * 64}}, "data, validation set"),
        ({"config": {"validation_tokens": 512}}, "validation set"),
        ({"steps": 200}, "tokens"),
        ({"config": {"weight_decay": 0.0}}, "weight_decay"),
        ({"config": {"context": 32}}, "validation set, tokens"),
        ({"deepspeed": {"optimizer": {"type": "Muon"}}}, "deepspeed.optimizer.type"),
        ({"data": {"changes": [{"step": 5, "key": "data", "was": "a", "now": "b"}]}}, "changed on the way"),
    ],
)
def test_unequal_runs_are_not_ranked_unless_a_reason_is_given(tmp_path, changes, what):
    write_sweep(tmp_path, {"vanilla": A})
    for seed, loss in enumerate(B, 1):
        write_run(tmp_path / "runs" / f"o{seed}", residual="other", seed=seed, loss=loss, **changes)
    refused = compare([tmp_path])
    assert f"they differ in {what}." in refused.refusal and refused.orders is None
    assert all(variant.difference is None for variant in refused.variants)
    assert [one.key for one in refused.differing if not one.comparable] == what.split(", ")
    allowed = compare([tmp_path], baseline="vanilla", allow="only to look")
    assert allowed.refusal is None and "only to look" in allowed.allowed and what in allowed.allowed
    assert any(variant.difference for variant in allowed.variants)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"environment": {"processor": "Another"}}, "environment.processor"),
        ({"environment": {"versions": {"torch": "2.14.0"}}}, "environment.versions.torch"),
        ({"config": {"compile": True}}, "compile"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed.zero_optimization.stage"),
    ],
)
def test_other_differences_are_told_and_ranked(tmp_path, changes, key):
    write_sweep(tmp_path, {"vanilla": A})
    for seed, loss in enumerate(B, 1):
        write_run(tmp_path / "runs" / f"o{seed}", residual="other", seed=seed, loss=loss, **changes)
    found = compare([tmp_path])
    assert found.refusal is None
    differing = {one.key: one for one in found.differing}
    others = {f"runs/o{seed}" for seed in (1, 2, 3)}
    assert any(set(runs) == others for _, runs in differing[key].values)
    times = [note for note in found.notes if "compare these too" in note]
    assert bool(times) == (key in ("environment.processor", "compile"))


def test_what_validation_reads_counts_and_not_what_was_asked_for(tmp_path):
    """The split has 5,000 tokens: to ask for more of them changes nothing."""
    write_run(tmp_path / "a", seed=1, config={"validation_tokens": 10_000})
    write_run(tmp_path / "b", seed=1, residual="other", config={"validation_tokens": 20_000})
    assert compare([tmp_path]).refusal is None


def test_a_budget_of_flops_is_ranked_at_unequal_tokens(tmp_path):
    write_sweep(
        tmp_path,
        {"vanilla": A, "costly": B},
        steps={"vanilla": 120, "costly": 100},
        flops_per_token={"vanilla": 5_000_000, "costly": 6_000_000},
    )
    found = compare([tmp_path])
    assert found.refusal is None and any("equal FLOPs, not equal tokens" in note for note in found.notes)


def test_a_budget_of_time_is_ranked_at_unequal_tokens(tmp_path):
    write_sweep(
        tmp_path,
        {"vanilla": A, "slow": B},
        steps={"vanilla": 200, "slow": 100},
        tokens_per_second={"vanilla": 2000.0, "slow": 1030.0},
    )
    found = compare([tmp_path])
    assert found.refusal is None and any("equal training time, not equal tokens" in note for note in found.notes)


def test_a_rate_at_which_a_run_diverged_is_not_the_best(tmp_path):
    write_sweep(tmp_path, {"vanilla": A, "other": {1e-3: B, 3e-3: [3.0, None, 3.0]}})
    found = compare([tmp_path])
    other = by_name(found)["other"]
    assert other.learning_rate == 1e-3 and [rate.diverged for rate in other.rates] == [0, 1]
    assert "diverged" in lines(found)["runs/other-0.003-2"]


def test_a_variant_that_diverged_at_every_rate_is_told_and_not_ranked(tmp_path):
    write_sweep(tmp_path, {"vanilla": A, "other": {1e-3: [3.0, None], 3e-3: [None, 3.0]}})
    found = compare([tmp_path])
    assert [variant.name for variant in found.variants] == ["vanilla"]
    assert "not ranked: at every learning rate some of its runs diverged" in lines(found)["other"]


def test_a_missing_run_keeps_its_rate_from_being_chosen(tmp_path):
    write_sweep(tmp_path, {"vanilla": A, "other": {1e-3: B, 3e-3: [3.0, 3.0, 3.0]}})
    (tmp_path / "runs" / "other-0.003-2").rename(tmp_path / "elsewhere")
    found = compare([tmp_path])
    assert by_name(found)["other"].learning_rate == 1e-3
    assert "missing" in lines(found)["runs/other-0.003-2"]


def test_an_unfinished_seed_is_left_out_of_the_pairs_and_told(tmp_path):
    write_sweep(tmp_path, {"vanilla": A, "other": B[:2]})
    write_run(tmp_path / "runs" / "third", residual="other", seed=3, until=50)
    found = compare([tmp_path])
    assert by_name(found)["other"].difference.seeds == (1, 2)
    assert "unfinished at step 50 of 100" in lines(found)["runs/third"]
    assert any("other is compared without the seeds 3" in note for note in found.notes)


def test_of_two_runs_of_one_seed_none_is_picked_for_its_loss(tmp_path):
    write_sweep(tmp_path, {"vanilla": A, "other": B})
    again = {"started": "2026-05-01T00:00:00+0000"}
    write_run(tmp_path / "runs" / "again", residual="other", seed=1, loss=2.9, environment=again)
    refused = compare([tmp_path])
    assert "runs/other-0.001-1 and runs/again are of the same variant, learning rate and seed" in refused.refusal
    allowed = compare([tmp_path], allow="the first counts")
    assert by_name(allowed)["other"].loss.samples[0].value == B[0]
    assert "runs/again" in lines(allowed)


def test_a_copy_of_a_run_is_told_and_changes_nothing(tmp_path):
    write_sweep(tmp_path, {"vanilla": A, "other": B})
    write_run(tmp_path / "runs" / "copy", residual="other", seed=1, loss=B[0])
    found = compare([tmp_path])
    assert found.refusal is None and "its losses are the same" in "".join(lines(found).values())
    assert len(by_name(found)["other"].loss.samples) == 3


@pytest.mark.parametrize(
    "options, names",
    [
        ([{"residual": "a"}, {"residual": "b(x=1)"}], ["a", "b(x=1)"]),
        ([{"attention": "softmax"}, {"attention": "gla"}], ["softmax", "gla"]),
        ([{"residual": "a", "attention": "gla"}, {"residual": "b"}], ["a, gla", "b, softmax"]),
        ([{"config": {"width": 64}}, {}], ["width=64", "width=32"]),
        ([{}], ["vanilla"]),
    ],
)
def test_names_are_what_tells_variants_apart(tmp_path, options, names):
    for number, option in enumerate(options):
        write_run(tmp_path / str(number), **option)
    assert sorted(by_name(compare([tmp_path], baseline=names[0]))) == sorted(names)


def test_the_baseline_is_vanilla_or_named(tmp_path):
    write_sweep(tmp_path, {"a": A, "b": B})
    with pytest.raises(UserError, match="--baseline is missing: name the variant to compare with, one of a, b"):
        compare([tmp_path])
    with pytest.raises(UserError, match="--baseline c: no variant"):
        compare([tmp_path], baseline="c")
    assert compare([tmp_path], baseline="b").variants[0].name == "b"


def test_vanilla_against_softmax_is_the_baseline_of_a_sweep_over_both(tmp_path):
    for number, (residual, attention) in enumerate([("vanilla", "gla"), ("a", "softmax"), ("vanilla", "softmax")]):
        write_run(tmp_path / str(number), residual=residual, attention=attention)
    assert compare([tmp_path]).baseline == "vanilla, softmax"


def test_runs_of_one_seed_that_saw_other_data_are_not_paired(tmp_path):
    """Orders differ between seeds, and must not within one."""
    write_sweep(tmp_path, {"vanilla": A, "other": B})
    for run in (tmp_path / "runs").iterdir():
        order = {"sha256": run.name[-1] * 64}
        (run / "initial.json").write_text(json.dumps({"schema": 1, "order": order, "parameters": {}}))
    assert compare([tmp_path]).refusal is None
    (tmp_path / "runs" / "other-0.001-2" / "initial.json").write_text(json.dumps({"order": {"sha256": "9" * 64}}))
    assert "they differ in order of the data at seed 2." in compare([tmp_path]).refusal


def test_one_variant_alone_has_a_loss_and_no_order(tmp_path):
    write_sweep(tmp_path, {"vanilla": A})
    found = compare([tmp_path])
    assert found.orders is None and found.refusal is None
    assert found.variants[0].loss.mean == pytest.approx(np.mean(A))


def test_the_order_of_runs_and_paths_changes_nothing(tmp_path):
    write_sweep(tmp_path / "x", {"vanilla": A, "other": B})
    write_sweep(tmp_path / "y", {"third": [3.1, 3.2, 3.3]})
    made = {"made": ""}
    both = [compare([tmp_path / a, tmp_path / b]).model_copy(update=made) for a, b in ("xy", "yx")]
    assert both[0].model_dump() == both[1].model_dump()
    assert both[0].variants[0].loss.samples[0].source.run == "x/runs/vanilla-0.001-1"


def test_a_report_is_json_without_nan(two):
    text = two.model_dump_json()
    assert Comparison.model_validate_json(text) == two
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
