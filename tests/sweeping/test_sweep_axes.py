"""What is written on a sweep's command line, and what a budget pays for."""

import json
import math
from pathlib import Path

import pytest
from sweeps import MODEL, TOKENS, code_of, listed, make_place, options

from megaresid.config import parse
from megaresid.errors import UserError
from megaresid.model.flops import training_flops_per_token
from megaresid.sweeping.axes import Budget, parse_budget, parse_rates, parse_seeds, run_name, split_specs, variant_name
from megaresid.sweeping.calibration import with_steps
from megaresid.sweeping.folder import Axes, Run, Sweep

CPU = Path(__file__).parents[2] / "ds_configs/cpu.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("axes"))


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.parametrize(
    "text, specs",
    [
        ("vanilla", ["vanilla"]),
        ("a,b(x=1, y=2) ,c", ["a", "b(x=1, y=2)", "c"]),
        ("3*a + b(f(x=1,y=2),z), my.module:Mine", ["3*a + b(f(x=1,y=2),z)", "my.module:Mine"]),
        ("a | 2*b(n=1,m=2) + c | a,b", ["a | 2*b(n=1,m=2) + c | a", "b"]),
    ],
)
def test_lists_are_split_at_commas_outside_parentheses(text, specs):
    assert split_specs(text, "--residual") == specs


@pytest.mark.parametrize("text", ["", "a,", ",a", "a,,b", "a,b(x=1),a"])
def test_lists_with_a_hole_or_a_repetition_are_refused(text):
    with pytest.raises(UserError, match="^--residual"):
        split_specs(text, "--residual")


@pytest.mark.parametrize(
    "text, seeds", [("3", [1, 2, 3]), ("1", [1]), ("7,", [7]), ("4,2", [4, 2]), ("0,1,2,", [0, 1, 2])]
)
def test_one_number_counts_seeds_and_several_are_the_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1,1", "1.5", "1,,2", ",", "99999999"])
def test_other_seeds_are_refused(text):
    with pytest.raises(UserError, match="^--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize("text", ["0", "-1e-3", "nan", "inf", "1e-3,", "1e-3,0.001", "fast"])
def test_other_learning_rates_are_refused(text):
    with pytest.raises(UserError, match="^--learning-rates"):
        parse_rates(text)


@pytest.mark.parametrize("text", ["1e8", "tokens", "tokens=", "tokens=0", "steps=5", "flops=-1", "seconds=nan"])
def test_other_budgets_are_refused(text):
    with pytest.raises(UserError, match="^--budget"):
        parse_budget(text)


def test_names_are_files_names_and_distinct():
    specs = ["a", "a(b=1)", "a(b=2)", "3*a + b", "a | b | a", "my.module:Mine", "x" * 90 + "(y=1)", "x" * 90 + "(y=2)"]
    points = [(3e-4, 1), (3e-4, 2), (1e-3, 1)]
    names = {run_name(variant_name(spec, "softmax"), *point) for spec in specs for point in points}
    assert len(names) == len(points) * len(specs)
    assert all(len(name) < 120 and not set(name) & set("/:*| ()'\"") for name in names)


def flops_by_hand(place, spec):
    config = parse(
        ["--residual", spec, "--data", str(place / "data"), "--deepspeed_config", str(place / "ds.json")]
        + ["--run-dir", "x", *MODEL]
    )
    return training_flops_per_token(config.plan()) * TOKENS


def test_a_budget_of_flops_gives_each_variant_the_steps_that_it_pays_for(place):
    """Held to the count of the variants' own FLOPs; a step that is paid for in part is not made."""
    specs = ["vanilla", "hyper_connections(streams=4)"]
    a_step = {spec: flops_by_hand(place, spec) for spec in specs}
    assert a_step["vanilla"] < a_step["hyper_connections(streams=4)"]
    budget = 7 * a_step["hyper_connections(streams=4)"]
    out = "sweeps/flops"
    arguments = options(place, out, residual=",".join(specs), budget=f"flops={budget}") + ["--slurm"]
    assert code_of(arguments) == 0
    steps = {run["config"]["residual"]: run["steps"] for run in listed(place / out)}
    assert steps == {"vanilla": math.floor(budget / a_step["vanilla"]), "hyper_connections(streams=4)": 7}
    assert all(run["config"]["steps"] == run["steps"] for run in listed(place / out))
    assert code_of([*options(place, "sweeps/less", residual=specs[1], budget=f"flops={budget - 1}"), "--slurm"]) == 0
    assert [run["steps"] for run in listed(place / "sweeps/less")] == [6]


def test_without_a_deepspeed_config_the_runs_have_the_quickstarts(place):
    arguments = options(place, "sweeps/unnamed")
    at = arguments.index("--deepspeed_config")
    assert code_of([*arguments[:at], *arguments[at + 2 :], "--slurm"]) == 0
    assert {Path(run["config"]["deepspeed_config"]) for run in listed(place / "sweeps/unnamed")} == {CPU}


def test_a_budget_of_seconds_gives_the_steps_of_the_measured_time():
    runs = [
        Run(name=f"{variant}-{seed}", variant=variant, config={"seed": seed, "steps": None}, steps=None)
        for variant in ("fast", "slow", "unknown")
        for seed in (1, 2)
    ]
    axes = Axes(residual=("a",), attention=("b",), seeds=(1, 2), learning_rates=(1.0,))
    sweep = Sweep(axes=axes, budget="seconds=60", num_accelerators=1, runs=tuple(runs))
    found = with_steps(sweep, {"fast": 0.25, "slow": 7.0}, Budget("seconds", 60.0))
    assert [run.steps for run in found.runs] == [240, 240, 8, 8, None, None]
    assert [run.config["steps"] for run in found.runs] == [240, 240, 8, 8, None, None]
    with pytest.raises(UserError, match="--budget seconds=60: a step of slow takes 61 seconds"):
        with_steps(sweep, {"slow": 61.0}, Budget("seconds", 60.0))
    again = with_steps(found, {}, Budget("seconds", 60.0))
    assert again == found, "what has been measured is not measured again"


def test_every_combination_is_planned_with_its_rate_a_tenth_of_it_and_whole_paths(place, monkeypatch):
    monkeypatch.chdir(place)
    axes = {"attention": "softmax,2*gla + softmax", "seeds": "2", "learning_rates": "1e-3,2e-3"}
    arguments = options(place, "sweeps/grid", **axes)
    arguments[arguments.index(str(place / "data"))] = "data"
    assert code_of([*arguments, "--slurm"]) == 0
    runs = listed(place / "sweeps/grid")
    keys = ("residual", "attention", "learning_rate", "seed")
    assert {tuple(run["config"][key] for key in keys) for run in runs} == {
        (residual, attention, rate, seed)
        for residual in ("vanilla", "learned_scale")
        for attention in ("softmax", "2*gla + softmax")
        for rate in (1e-3, 2e-3)
        for seed in (1, 2)
    }
    assert len({run["name"] for run in runs}) == len(runs) == 16
    for run in runs:
        assert run["config"]["min_learning_rate"] == pytest.approx(run["config"]["learning_rate"] / 10)
        assert run["config"]["data"] == [str(place / "data")] and "run_dir" not in run["config"]
    assert [run["config"]["seed"] for run in runs] == [1] * 8 + [2] * 8, "all variants at a seed first"


def test_a_smallest_rate_that_is_given_stays(place):
    arguments = options(place, "sweeps/least", learning_rates="1e-3,2e-3")
    assert code_of([*arguments, "--min-learning-rate", "3e-5", "--slurm"]) == 0
    assert {run["config"]["min_learning_rate"] for run in listed(place / "sweeps/least")} == {3e-5}


REFUSED = {
    "an unknown variant": ({"residual": "vanilla,vanila"}, [], "unknown residual 'vanila': did you mean 'vanilla'?"),
    "an unknown mixer": ({"attention": "sotfmax"}, [], "unknown attention 'sotfmax'"),
    "one model twice": ({"residual": "vanilla,1*vanilla"}, [], "is the same model as --residual vanilla"),
    "an unknown option": ({}, ["--bach-size", "3"], "unknown option --bach-size"),
    "an option of its own": ({}, ["--steps", "5"], "--steps: a sweep sets it for each run: they follow from --budget"),
    "a run directory": ({}, ["--run_dir=x"], "--run-dir: a sweep sets it"),
    "too small a budget": ({"budget": "tokens=63"}, [], "--budget tokens=63: a step of --residual vanilla"),
    "too little data": ({}, ["--global-batch-size", "4096"], "fewer than one global batch of 4096"),
    "ranks that do not divide": ({"num_accelerators": "3"}, [], "--global-batch-size 4 is not divisible by the 3"),
    "a smallest rate above": ({"learning_rates": "1e-5"}, ["--min-learning-rate", "1e-3"], "is above --learning-rate"),
    "no jobs": ({"jobs": "0"}, [], "--jobs 0: must be at least 1"),
    "only with more": ({}, ["--only", "1"], "--only takes everything from the sweep"),
}


@pytest.mark.parametrize("changes, more, message", REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_told_before_anything_is_written(place, capsys, changes, more, message):
    assert code_of([*options(place, "sweeps/refused", **changes), *more]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and message in said.err and len(said.err.splitlines()) == 1
    assert not (place / "sweeps/refused").exists()


def test_a_budget_is_asked_for(place, capsys):
    arguments = options(place, "sweeps/none")
    position = arguments.index("--budget")
    assert code_of(arguments[:position] + arguments[position + 2 :]) == 2
    assert "--budget is missing: give tokens=NUMBER" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"residual": "vanilla"}, "has a run learned_scale-softmax-lr0.0003-seed1, which the command leaves out"),
        ({"budget": "tokens=640"}, "its sweep has --budget tokens=192, not tokens=640"),
        ({"num_accelerators": "2"}, "its sweep has --num-accelerators 1, not 2"),
        ({"learning_rates": "1e-3"}, "which the command leaves out"),
    ],
)
def test_another_command_in_the_folder_of_a_sweep_is_refused(place, capsys, changes, message):
    out = f"sweeps/{len(str(changes))}"
    assert code_of([*options(place, out), "--slurm"]) == 0
    before = (place / out / "sweep.json").read_bytes()
    assert code_of([*options(place, out, **changes), "--slurm"]) == 2
    assert message in capsys.readouterr().err
    assert (place / out / "sweep.json").read_bytes() == before


def test_another_configuration_is_refused_by_its_key(place, capsys):
    out = "sweeps/keys"
    assert code_of([*options(place, out), "--slurm"]) == 0
    assert code_of([*options(place, out), "--slurm", "--weight-decay", "0.5"]) == 2
    assert "has weight_decay=0.1, and the command 0.5" in capsys.readouterr().err


def test_axes_can_be_enlarged_and_runs_keep_their_numbers(place):
    out = "sweeps/larger"
    assert code_of([*options(place, out), "--slurm"]) == 0
    before = listed(place / out)
    assert code_of([*options(place, out, residual="rezero,vanilla,learned_scale", seeds="1,2"), "--slurm"]) == 0
    after = listed(place / out)
    assert after[: len(before)] == before and len(after) == 6
    axes = json.loads((place / out / "sweep.json").read_bytes())["axes"]
    assert axes["seeds"] == [1, 2] and axes["residual"] == ["rezero", "vanilla", "learned_scale"]


@pytest.mark.parametrize(
    "text, message",
    [("{}", "damaged or another version's"), ("not JSON", "is damaged"), ('{"schema": 2}', "damaged or another")],
)
def test_a_damaged_sweep_is_one_line(place, capsys, text, message):
    out = place / "sweeps" / f"damaged {len(text)}"
    out.mkdir(parents=True)
    (out / "sweep.json").write_text(text)
    assert code_of(options(place, str(out))) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(place, capsys):
    out = place / "sweeps/else"
    out.mkdir(parents=True)
    (out / "notes.txt").touch()
    assert code_of(options(place, str(out))) == 2
    assert "holds something that is no sweep" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
