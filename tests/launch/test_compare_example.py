"""launch/compare_example.sh: the data, then a sweep whose command line is valid, then the report."""

from test_scripts import calls, checkout, run, write_program  # noqa: F401

from megaresid.model.presets import PRESETS
from megaresid.residual.stream import RESIDUALS
from megaresid.spec import parse_pattern
from megaresid.sweep import _options
from megaresid.sweeping.axes import parse_budget, parse_rates, parse_seeds, split_specs

SWEEP = '#!/bin/sh\nprintf \'%s\\n\' "$(basename "$0")" "$@" --- >> calls\ncase "$*" in *sweep*) exit {code} ;; esac\n'


def modules(checkout):  # noqa: F811
    return [call[2] for call in calls(checkout)]


def with_data(checkout):  # noqa: F811
    (checkout / "data/python-docs").mkdir(parents=True)
    (checkout / "data/python-docs/manifest.json").touch()


def test_the_chain_and_the_sweeps_command_line(checkout):  # noqa: F811
    assert run("bash", "launch/compare_example.sh").returncode == 0
    assert modules(checkout) == ["data_prep", "megaresid.sweep", "megaresid.compare"]
    chosen, rest = _options(calls(checkout)[1][3:])
    specs = split_specs(chosen.residual, "--residual")
    for spec in specs:
        RESIDUALS.resolve(parse_pattern(spec).terms[0][1])
    assert specs[0] == "vanilla"
    assert [spec.rpartition(":")[2] for spec in specs[-2:]] == ["VanillaAgain", "BrokenIdentity"]
    assert parse_seeds(chosen.seeds) == [1, 2, 3] and len(parse_rates(chosen.learning_rates)) == 2
    sizes = dict(zip(rest, rest[1:]))
    step = int(sizes["--global-batch-size"]) * PRESETS[sizes["--model"]].context
    assert parse_budget(chosen.budget).amount == 100 * step and chosen.jobs == 2
    assert calls(checkout)[2][3:] == [str(chosen.out), "--baseline", "vanilla", "--out", f"{chosen.out}/report"]


def test_runs_that_failed_are_reported_and_a_stopped_sweep_is_not(checkout):  # noqa: F811
    with_data(checkout)
    for code, last in ((1, "megaresid.compare"), (75, "megaresid.sweep"), (2, "megaresid.sweep")):
        (checkout / "calls").unlink(missing_ok=True)
        write_program(checkout / ".venv/bin/python", SWEEP.format(code=code))
        assert run("bash", "launch/compare_example.sh").returncode == code
        assert modules(checkout)[-1] == last
