"""--dry-run says what will be measured and when, having read and checked it."""

import json
import os
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main as data_prep
from megaresid.train import main


@pytest.fixture
def options(tmp_path, monkeypatch) -> list[str]:
    documents = [{"text": f"Document {n} tells of {n * 7} things, in the {n}th of its words. " * 20} for n in range(60)]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(document) + "\n" for document in documents))
    made = ["--source", "jsonl", "--input", str(text), "--out", str(tmp_path / "data"), "--validation-fraction", "0.2"]
    data_prep(made)
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}))
    texts = tmp_path / "texts"
    texts.mkdir()
    passages = [{"text": f"There was a time of {n} things and of the end"} for n in range(4)]
    (texts / "lambada_test.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    (tmp_path / "my_own_hooks.py").write_text("def norms(engine):\n    return {}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("TORCH_EXTENSIONS_DIR", "PATH"):  # the command sets them for its own process
        monkeypatch.setenv(name, os.environ.get(name, ""))
    options = ["--data", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run"), "--model", "tiny"]
    options += ["--deepspeed_config", str(tmp_path / "ds.json"), "--context", "32", "--global-batch-size", "8"]
    yield [*options, "--steps", "3", "--dry-run", "--eval-data", str(texts)]
    sys.modules.pop("my_own_hooks", None)


def test_the_dry_run_says_what_is_measured_and_when(options, tmp_path, capsys):
    main([*options, "--eval", "my_own_hooks:norms,validation@1500 lambada@end"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate")]
    assert said == [
        "evaluate  validation every 1,500 steps and at both ends",
        "evaluate  my_own_hooks:norms every 1,500 steps and at both ends",
        "evaluate  lambada at the end",
    ]
    assert not (tmp_path / "run").exists()


def test_without_a_validation_no_validation_split_is_needed(options, tmp_path, capsys):
    for shard in Path(tmp_path / "data").glob("val_*"):
        shard.unlink()
    main([*options, "--eval", "lambada@end"])
    assert "evaluate  lambada at the end" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*options, "--eval", "lambada,validation@end"])


def test_a_text_for_a_model_of_other_tokens_is_refused(options, monkeypatch, capsys):
    monkeypatch.setattr("data_prep.tokenizer.RANKS_SHA256", "0" * 64)
    main([*options, "--eval", "validation@end"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*options, "--eval", "lambada@end"])
    assert caught.value.code == 2
    assert "error: --eval lambada: its text is cut up by GPT-2's tokenizer" in capsys.readouterr().err
