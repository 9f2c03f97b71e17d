"""The command: what it prints, what it writes and where, and what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
from made_sweeps import write_run, write_sweep
from scipy import stats

from megaresid.compare import report
from megaresid.compare.__main__ import check_out, main
from megaresid.compare.noise import estimate_noise
from megaresid.errors import UserError

A, B, C = [3.200, 3.212, 3.195], [3.150, 3.166, 3.143], [3.201, 3.208, 3.199]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def undrawn(monkeypatch):
    """Of a report its JSON alone: to draw it takes seconds."""

    def write(comparison, out):
        out.mkdir(exist_ok=True)
        (out / "report.json").write_text(comparison.model_dump_json())

    monkeypatch.setattr(report, "write", write)


def test_the_answer_is_printed_and_the_report_written(tmp_path, capsys):
    """By a process that starts without numbers' libraries, and never has torch."""
    write_sweep(tmp_path / "sweep", {"vanilla": A, "better": B, "alike": C})
    code = (
        "import sys; from megaresid.compare.__main__ import main\n"
        "assert not {'scipy', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        f"main([{str(tmp_path / 'sweep')!r}, '--out', {str(tmp_path / 'report')!r}])\n"
        "assert 'scipy' in sys.modules, 'the check would pass on anything'\n"
        "assert not {'torch', 'deepspeed', 'transformers', 'lm_eval', 'datasets', 'fla', 'triton'} & set(sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    rows = {line.split()[0]: line for line in said.splitlines() if line.split()}
    assert "-0.0493" in rows["better"] and " better " in rows["better"] and "x1.00" in rows["better"]
    assert "not distinguishable" in rows["alike"] and "baseline" in rows["vanilla"]
    tree = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [variant["name"] for variant in tree["variants"]] == ["vanilla", "better", "alike"]
    check_out(tmp_path / "report")  # its own report may be written again, and nothing else
    assert "is in use" in refused(capsys, tmp_path / "sweep", "--out", tmp_path / "sweep")


def test_a_refusal_is_printed_and_its_reason_too(tmp_path, capsys, undrawn):
    write_sweep(tmp_path / "s", {"vanilla": A})
    write_run(tmp_path / "s" / "runs" / "o", residual="other", data={"identity": "6" * 64})
    main([str(tmp_path / "s"), "--out", str(tmp_path / "report")])
    assert "The runs are not ranked: they differ in data, validation set." in capsys.readouterr().out
    main([str(tmp_path / "s"), "--out", str(tmp_path / "report"), "--allow", "the same text, prepared twice"])
    said = capsys.readouterr().out
    assert "for this reason: the same text, prepared twice" in said and "not ranked" not in said


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "nothing to compare"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["s", "--allow", " "], "--allow is empty"),
        (["s", "--baseline", "vanila"], "did you mean 'vanilla'"),
        (["s", "--out", "s/sweep.json"], "is a file"),
        (["one", "--noise"], "needs two ended runs"),
        (["same", "--noise"], "the same final losses"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_sweep(tmp_path / "s", {"vanilla": A})
    write_sweep(tmp_path / "one", {"vanilla": A[:1]})
    write_sweep(tmp_path / "same", {"vanilla": [3.0, 3.0]})
    said = refused(capsys, *arguments)
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}'])
def test_a_folder_of_something_else_is_not_overwritten(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match="is in use"):
        check_out(tmp_path)


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    write_sweep(tmp_path / "x", {"vanilla": [3.0]})
    said = refused(capsys, str(tmp_path / "x"), "--out", str(tmp_path / "file" / "x"))
    assert "--out" in said and "cannot be written: Not a directory" in said


def test_an_empty_folder_may_be_written_to(tmp_path):
    check_out(tmp_path)
    check_out(tmp_path / "new")


def test_noise_of_one_variant_is_that_of_its_seeds(tmp_path, capsys):
    write_sweep(tmp_path, {"vanilla": A})
    noise = estimate_noise([tmp_path])
    assert noise.of_losses.value == pytest.approx(np.std(A, ddof=1)) and noise.of_losses.freedom == 2
    assert not noise.paired
    assert noise.of_differences.value == pytest.approx(np.sqrt(2) * np.std(A, ddof=1))
    variance = np.var(A, ddof=1)
    low, high = 2 * variance / stats.chi2.isf([0.025, 0.975], 2)
    assert (noise.of_losses.low, noise.of_losses.high) == pytest.approx((low**0.5, high**0.5))
    main([str(tmp_path), "--noise"])
    said = capsys.readouterr().out
    assert "seeds needed" in said and "taken to be sqrt(2) times" in said


def test_noise_between_two_variants_is_that_of_their_differences(tmp_path):
    write_sweep(tmp_path, {"vanilla": A, "other": C})
    noise = estimate_noise([tmp_path])
    spread = np.std(np.subtract(A, C), ddof=1)
    assert noise.paired and noise.of_differences.value == pytest.approx(spread)
    assert noise.of_losses.value == pytest.approx(np.sqrt((np.var(A, ddof=1) + np.var(C, ddof=1)) / 2))
    assert noise.of_losses.freedom == 4 and noise.of_differences.freedom == 2
    needed, at_most = noise.needed(0.01)
    tested = stats.ttest_1samp(np.random.default_rng(0).normal(0.01, spread, (20_000, needed)), 0, axis=1).pvalue
    assert np.mean(tested < 0.05) > 0.79 and at_most > needed


def test_noise_of_several_variants_is_unbiased(tmp_path):
    """Seeds move all variants alike, and each run alone: only the latter is in a difference."""
    generator, found = np.random.default_rng(5), []
    for number in range(6):
        shared = generator.normal(0, 0.1, 8)
        losses = {name: list(3 + shared + generator.normal(0, 0.01, 8)) for name in ("vanilla", "a", "b", "c")}
        noise = estimate_noise([write_sweep(tmp_path / str(number), losses, every=100)])
        found.append(noise.of_differences.value ** 2)
        assert noise.of_differences.freedom == 21
    assert np.mean(found) == pytest.approx(2 * 0.01**2, rel=0.4)
