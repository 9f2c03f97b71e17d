"""The benchmark of tasks beside HFLM: what it counts as a difference, and a whole run."""

import json

import pytest

from megaresid.benchmark.evaluating import Request, differences, main, report
from megaresid.errors import UserError


def sample(document: int, *scores: float, right: int = 0, greedy: bool = False) -> dict:
    """A document of choices "x", "xx", ...; the right one is ``right``."""
    by_character = [score / (i + 1) for i, score in enumerate(scores)]
    return {
        "doc_id": document,
        "arguments": [("question", " " + "x" * (i + 1)) for i in range(len(scores))],
        "filtered_resps": [(score, greedy) for score in scores],
        "metrics": ["acc", "acc_norm"],
        "acc": float(max(scores) == scores[right]),
        "acc_norm": float(max(by_character) == by_character[right]),
    }


def test_differences_are_counted_and_other_answers_listed_with_their_margins():
    ours = [sample(0, -1.0, -9.0), sample(1, -3.00004, -3.0), sample(2, -1.0, -9.0, greedy=True)]
    theirs = [sample(0, -1.0002, -9.0), sample(1, -3.0, -3.00002), sample(2, -1.0, -9.0)]
    found = differences(ours, theirs)
    assert found["largest"] == pytest.approx(2e-4)
    assert (found["beyond"], found["greedy"]) == (1, 2)
    (other,) = found["answers"]
    assert (other["document"], other["metric"]) == (1, "acc")
    assert other["margin"] == pytest.approx(2e-5)


def test_a_large_sum_may_differ_by_what_fp32_can_tell():
    assert differences([sample(0, -2000.0004, -1.0)], [sample(0, -2000.0, -1.0)])["beyond"] == 0
    assert differences([sample(0, -2000.0006, -1.0)], [sample(0, -2000.0, -1.0)])["beyond"] == 1


def test_a_margin_of_acc_norm_is_by_character():
    (other,) = differences([sample(0, -1.0, -2.1)], [sample(0, -1.0, -1.9, right=0)])["answers"]
    assert (other["metric"], other["margin"]) == ("acc_norm", pytest.approx(0.05))


def measured(**changes) -> dict:
    task = {"items": 10, "seconds": {"ours": [1.0, 2.0], "HFLM": [2.0, 4.0]}, "largest": 1e-6, "beyond": 0}
    return {"piqa": task | {"greedy": 0, "answers": []} | changes}


@pytest.mark.parametrize(
    "changes, exact, missed",
    [
        ({}, True, []),
        ({"seconds": {"ours": [2.0], "HFLM": [1.9]}}, True, ["piqa is slower than HFLM"]),
        ({"beyond": 2}, True, ["2 log-likelihoods of piqa differ by more than 0.0001"]),
        ({"beyond": 2}, False, []),
        ({"answers": [{"document": 3, "metric": "acc", "margin": 5e-5}]}, True, []),
        (
            {"answers": [{"document": 3, "metric": "acc", "margin": 5e-4}]},
            True,
            ["1 documents of piqa are answered otherwise, and by no close margin"],
        ),
    ],
)
def test_goals(changes, exact, missed):
    text, found = report(measured(**changes), exact)
    assert found == missed
    assert "piqa" in text and ("document 3" in text) == ("answers" in changes)


def test_the_table_has_speeds_and_their_ratio():
    text, _ = report(measured(), True)
    assert text.splitlines()[1].split() == "piqa 2.000 (2.000 to 2.000) 10 6.7 3.3 1e-06 0".split()


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(UserError, match="--rounds 0: must be at least 1"):
        Request(tmp_path, rounds=0).check()


@pytest.mark.full
def test_a_run_on_made_rows_meets_its_goals_of_agreement(tmp_path):
    rows = [{"goal": f"{n} of", "sol1": f"the {n}", "sol2": f"a word and {n}", "label": n % 2} for n in range(5)]
    (tmp_path / "piqa_valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Request(tmp_path, tasks="piqa", rounds=1, json=tmp_path / "out.json", threads=1)
    try:
        main(options)
    except SystemExit:  # so little work says nothing of speed
        pass
    tree = json.loads((tmp_path / "out.json").read_text())
    assert not [words for words in tree["missed"] if "slower" not in words]
    assert tree["tasks"]["piqa"]["items"] == 5
    (tmp_path / "lambada_test.jsonl").write_text('{"text": "two words"}')
    with pytest.raises(UserError, match="--tasks lambada_openai: it has no choices"):
        main(Request(tmp_path, tasks="lambada_openai"))
