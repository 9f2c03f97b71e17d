"""The benchmark of mixers by length: what takes turns, what the numbers mean, and the command at work."""

import json
from types import SimpleNamespace

import pytest
import torch

from megaresid.attention.mixer import MIXERS
from megaresid.benchmark import mixers
from megaresid.benchmark.mixer_report import Times, growth, print_tables, summarise
from megaresid.benchmark.mixers import CORES, Entry, Request, clock, core, mixer
from megaresid.errors import UserError


def rounds(*both: float) -> list[Times]:
    return [Times(seconds / 4, seconds) for seconds in both]


def test_growth_is_the_exponent_between_the_two_longest():
    assert growth({512: 99.0, 1024: 2.0, 2048: 8.0}) == pytest.approx(2)
    assert growth({100: 5.0, 1000: 50.0}) == pytest.approx(1)
    assert growth({512: 1.0}) is None


def test_a_row_is_medians_and_ahead_from_the_last_crossing_on():
    """Of the third the first crossing does not count, as it falls back behind; the fourth is never ahead for good."""
    lengths = (1, 2, 4, 8)
    both = {"softmax": (5, 5, 5, 5), "linear": (9, 5, 4, 3), "late": (1, 9, 9, 4), "never": (1, 1, 1, 5)}
    found = {
        ("core", name): {length: rounds(t, 100, 0) for length, t in zip(lengths, times)}
        for name, times in both.items()
    }
    rows = {row["name"]: row for row in summarise(found, "softmax")}
    assert {name: row["ahead_from"] for name, row in rows.items()} == {
        "softmax": None, "linear": 4, "late": 8, "never": None,
    }  # fmt: skip
    assert rows["linear"]["seconds"][2] == {"forward": 1.25, "both": 5}
    assert rows["linear"]["rounds"][2] == [{"forward": t / 4, "both": t} for t in (5, 100, 0)]


def test_each_group_has_softmax_of_its_own():
    seconds = {("core", "softmax"): 2, ("core", "a"): 3, ("mixer", "softmax"): 5, ("mixer", "a"): 3}
    found = {entry: {8: rounds(both)} for entry, both in seconds.items()}
    assert [row["ahead_from"] for row in summarise(found, "softmax")] == [None, None, None, 8]


def test_the_clock_is_of_the_second_pass(monkeypatch):
    """By a clock that only passes move: 3 forward, 4 backward, and 100 more the first time."""
    now, first = [0], [100]

    class Result(SimpleNamespace):
        def backward(self, cotangent):
            now[0] += 4

    def call():
        now[0] += 3 + first.pop() if first else 3
        return Result()

    monkeypatch.setattr(torch, "ones_like", lambda y: None)
    monkeypatch.setattr(mixers, "time", SimpleNamespace(process_time=lambda: now[0]))
    assert clock(call) == (3, 7)


def test_the_cores_are_different_functions_of_the_same_inputs():
    """The first token sees itself alone: its value, times what keys, queries and beta make of it."""
    request = Request(heads=2, head_width=4)
    found = {name: core(name, 70, request)().detach() for name in CORES}
    assert {tuple(o.shape) for o in found.values()} == {(1, 70, 2, 4)}
    assert len({tuple(o[0, -1, 0].tolist()) for o in found.values()}) == len(CORES)
    first = {name: o[0, 0] for name, o in found.items()}
    for name in ("retention", "simple GLA", "GLA"):
        torch.testing.assert_close(first[name], first["linear attention"])
    for name in ("gated delta rule", "KDA"):
        torch.testing.assert_close(first[name], first["delta rule"])
    for name in ("linear attention", "delta rule"):
        angle = torch.cosine_similarity(first[name], first["softmax"], dim=-1)
        torch.testing.assert_close(angle.abs(), torch.ones(2))


def test_all_that_run_here_are_measured_by_default():
    """Each once, softmax first; one that is made of others only by its presets."""
    specs = Request().specs()
    assert specs[0] == "softmax" and len(specs) == len(set(specs))
    assert {"gla", "kda", "delta_net", *MIXERS.presets()} <= set(specs)
    assert not {"blend", "split", "skip"} & set(specs)
    assert all(not MIXERS.classes()[spec].needs for spec in specs if spec in MIXERS.classes())
    assert Request(mixers="kda; gla;kda").specs() == ["softmax", "kda", "gla"]
    assert Request(mixers="").specs() == []


def test_a_whole_mixer_is_the_models_own():
    y = mixer("gla", 9, Request(heads=2, head_width=8))()
    assert y.shape == (1, 9, 16)
    y.backward(torch.ones_like(y))  # raises where nothing of it is trained
    with pytest.raises(UserError, match="glaa"):
        mixer("glaa", 9, Request())


def test_two_lengths_measured_kept_and_drawn(tmp_path, capsys):
    request = Request(
        lengths=(4, 70), heads=1, head_width=4, mixers="gla", rounds=2,
        json=tmp_path / "new" / "found.json", plot=tmp_path / "found.png",
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        mixers.main(request)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    kept = json.loads(request.json.read_text())
    entries = kept["entries"]
    assert [(row["group"], row["name"]) for row in entries] == [
        *(Entry("core", name) for name in CORES), Entry("mixer", "softmax"), Entry("mixer", "gla"),
    ]  # fmt: skip
    for row in entries:
        assert [len(times) for times in row["rounds"].values()] == [2, 2]
        assert all(0 < times["forward"] < times["both"] for of in row["rounds"].values() for times in of)
    assert kept["options"]["lengths"] == [4, 70] and kept["environment"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("| ")]
    (line,) = (row for row in cells if row[0] == "KDA")
    kda = next(row for row in entries if row["name"] == "KDA")
    assert line[1:3] == [
        f"{1e3 * times['forward']:,.1f} / {1e3 * times['both']:,.1f}" for times in kda["seconds"].values()
    ]
    assert said.count("\nround ") == 2 * 2 * len(entries)
    assert request.plot.read_bytes().startswith(b"\x89PNG")


def test_nowhere_ahead_and_one_length_are_said(capsys):
    print_tables(summarise({("core", "softmax"): {8: rounds(2)}}, "softmax"))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| softmax"))
    assert [cell.strip() for cell in line.split("|")[3:-1]] == ["n/a", "-"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"head_width": 0}, "--head-width 0"),
        ({"threads": 0}, "--threads 0"),
        ({"lengths": ()}, "--lengths"),
        ({"lengths": (1024, 512)}, "--lengths 1024 512"),
        ({"lengths": (1, 2)}, "--lengths 1 2"),
        ({"plot": "found.txt"}, "--plot found.txt"),
        ({"mixers": "glaa"}, "glaa"),
        ({"mixers": "gla(expand=2)"}, "expand"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, options, message):
    if "plot" in options:
        options = {"plot": tmp_path / options["plot"]}
        message = str(options["plot"])
    folder = tmp_path / "new"
    with pytest.raises(UserError) as refused:
        mixers.main(Request(**options, json=folder / "found.json"))
    assert message in str(refused.value) and not folder.exists()
