"""What diagnostics cost: what is counted, and how it is shown."""

import dataclasses
import json

import pytest

from megaresid.benchmark.diagnosing import Cost, Request, main, measure, table

COST = Cost(
    model="tiny",
    residual="vanilla",
    device="cpu",
    interval=100,
    numbers=7,
    step=2.0,
    gradient_norms=0.25,
    probe=0.5,
    recording=0.125,
    drawing=4.0,
    due_step=3.0,
    percent=0.4375,
    percent_in_turns=0.5,
    drawing_percent=1.0,
)


def test_the_table_has_each_part_and_the_percentages():
    title, _, *lines = table(COST)
    assert title == "tiny, vanilla, cpu, every 100 steps"
    rows = {line[:32].strip(): line[32:].split() for line in lines}
    assert rows["training step"] == ["2.000"] and rows["probe"] == ["0.500"]
    assert rows["recording 7 numbers"] == ["0.125"]
    assert rows["all of them"] == ["0.875", "0.438"]
    assert rows["the same, from steps in turns"] == ["1.000", "0.500"]
    assert rows["drawing, at most"] == ["4.000", "1.000"]


def test_no_measurement_is_none(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--repeats", "0"])
    assert ended.value.code == 2 and "--repeats 0" in capsys.readouterr().err


def measured(folder: str):
    """Runs on the one rank."""
    from pathlib import Path

    return dataclasses.asdict(measure(Request(context=16, batch=1, interval=5, repeats=1), Path(folder)))


@pytest.mark.full
def test_percentages_are_of_the_time_of_an_interval(ranks1, tmp_path):
    (found,) = ranks1.run(measured, str(tmp_path), timeout=300)
    json.dumps(found)
    interval, parts = 5 * found["step"], found["gradient_norms"] + found["probe"] + found["recording"]
    assert found["percent"] == pytest.approx(100 * parts / interval)
    assert found["percent_in_turns"] == pytest.approx(100 * (found["due_step"] - found["step"]) / interval)
    assert found["drawing_percent"] == min(1.0, 100 * found["drawing"] / interval)
    assert found["numbers"] > 20 and min(found[name] for name in ("probe", "drawing", "recording")) > 0
