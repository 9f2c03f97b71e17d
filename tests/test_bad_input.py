"""A user's mistakes: one line that names the value and the mend, exit code 2, and nothing written."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from made_runs import write_tensors

from data_prep.__main__ import main as data_prep
from megaresid.errors import UserError
from megaresid.train import main
from megaresid.training.run_dir import check_usable

DS_CONFIG = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "zero_optimization": {"stage": 1}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A small data set made by the command itself."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.jsonl"
    documents = [{"text": f"Document {n} tells of {n * 7} things, in the {n}th of its words. " * 20} for n in range(60)]
    text.write_text("".join(json.dumps(document) + "\n" for document in documents))
    made = folder / "shards"
    data_prep(["--source", "jsonl", "--input", str(text), "--out", str(made), "--validation-fraction", "0.2"])
    return made


@pytest.fixture
def workplace(tmp_path, dataset):
    """A folder of one test's own: a copy of the data, a DeepSpeed JSON, and no run directory yet."""
    copy = tmp_path / "data"
    copy.mkdir()
    for file in dataset.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (tmp_path / "ds.json").write_text(json.dumps(DS_CONFIG))
    return tmp_path


@pytest.fixture(autouse=True)
def environment_of_its_own(monkeypatch):
    """The command sets these for its own process, which here is the test's."""
    for name in ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "PATH"):
        monkeypatch.setenv(name, os.environ.get(name, "cpu"))


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every file with its bytes, and every folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def fails_with(workplace: Path, capsys, *options: str) -> str:
    """Run the command; check that it exits with 2, says one line and writes nothing. The line."""
    before = contents(workplace)
    given = {"--data": workplace / "data", "--run-dir": workplace / "run", "--deepspeed_config": workplace / "ds.json"}
    given |= {"--model": "tiny", "--context": "32", "--global-batch-size": "8", "--steps": "3"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(part) for pair in given.items() for part in pair])
    assert caught.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    assert contents(workplace) == before
    return said


def damage(workplace: Path, change) -> None:
    shard = workplace / "data" / "train_000000.bin"
    shard.write_bytes(change(shard.read_bytes()))


def test_the_unharmed_workplace_is_accepted(workplace, capsys):
    """Without this, every test below could pass for another reason than its own."""
    options = ["--data", workplace / "data", "--run-dir", workplace / "run"]
    options += ["--deepspeed_config", workplace / "ds.json"]
    options += ["--model", "tiny", "--context", "32", "--global-batch-size", "8", "--steps", "3", "--dry-run"]
    main([str(option) for option in options])
    assert "8 sequences x 1 accumulation x 1 ranks = 8 sequences, 256 tokens per step" in capsys.readouterr().out
    assert not (workplace / "run").exists()


def test_a_missing_data_folder(workplace, capsys):
    said = fails_with(workplace, capsys, "--data", str(workplace / "nowhere"))
    assert "nowhere" in said and "data_prep" in said


def test_a_folder_without_a_manifest(workplace, capsys):
    (workplace / "data" / "manifest.json").unlink()
    assert "manifest.json" in fails_with(workplace, capsys)


def test_a_shard_cut_short(workplace, capsys):
    damage(workplace, lambda content: content[:-10])
    said = fails_with(workplace, capsys)
    assert "train_000000.bin" in said and "cut short" in said


def test_a_shard_with_a_wrong_magic(workplace, capsys):
    damage(workplace, lambda content: np.int32(20240801).tobytes() + content[4:])
    said = fails_with(workplace, capsys)
    assert "train_000000.bin" in said and "20240801" in said and "20240520" in said


def test_a_shard_whose_largest_id_exceeds_the_vocabulary(workplace, capsys):
    path = workplace / "data" / "manifest.json"
    tree = json.loads(path.read_text())
    tree["content"]["shards"][0]["largest_id"] = 50_300
    path.write_text(json.dumps(tree))
    said = fails_with(workplace, capsys)
    assert "50300" in said and "50257" in said


def test_a_global_batch_that_does_not_divide(workplace, capsys, monkeypatch):
    assert "micro-batch 3" in fails_with(workplace, capsys, "--micro-batch-size", "3")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "not divisible by the 3 ranks" in fails_with(workplace, capsys)


def test_an_unknown_preset_option_or_key(workplace, capsys):
    assert "did you mean 'tiny'" in fails_with(workplace, capsys, "--model", "tinny")
    assert "did you mean 'reference'" in fails_with(workplace, capsys, "--preset", "referense")
    assert "did you mean 'steps'" in fails_with(workplace, capsys, "--step-s", "3")
    assert "did you mean 'vanilla'" in fails_with(workplace, capsys, "--residual", "vanila")
    assert "has no option 'windows'" in fails_with(workplace, capsys, "--attention", "softmax(windows=3)")
    (workplace / "run.json").write_text('{"lerning_rate": 1e-3}')
    said = fails_with(workplace, capsys, "--config", str(workplace / "run.json"))
    assert "did you mean 'learning_rate'" in said
    (workplace / "ds.json").write_text(json.dumps(DS_CONFIG | {"zero_optimisation": {}}))
    assert "did you mean 'zero_optimization'" in fails_with(workplace, capsys)
    (workplace / "ds.json").write_text(json.dumps(DS_CONFIG | {"zero_optimization": {"stag": 1}}))
    said = fails_with(workplace, capsys)
    assert "zero_optimization" in said and "did you mean 'stage'" in said


EVALUATIONS = {
    "validation": "it does not say when",
    "validation@0": "'0' is not a number of steps",
    "validation @5": "it does not say when",
    "validation@5 validation@end": "validation is named 2 times",
    "arc_eazy@end": "task 'arc_eazy'",
    "no_module_of_ours:measure@end": "cannot import it",
    "math:pi@end": "not a function of the engine alone",
    "piqa@end": "there is no piqa_valid.jsonl",
    "winogrande@end": "winogrande_xl_dev.jsonl, line 2: no field 'option1'",
    "lambada@end": "lambada_test.jsonl: there is no row in it",
    "wikitext2@end": "wikitext2_raw_test.txt.gz: a damaged gzip file",
}


@pytest.mark.parametrize("chosen", EVALUATIONS)
def test_an_evaluation_that_cannot_be_made(workplace, capsys, chosen):
    texts = workplace / "texts"
    texts.mkdir()
    row = {"sentence": "The cup did not fit the bag for _ was big.", "option1": "cup", "option2": "bag", "answer": "1"}
    rows = [row, {"sentence": row["sentence"], "option2": "bag", "answer": "2"}]
    (texts / "winogrande_xl_dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (texts / "lambada_test.jsonl").touch()
    (texts / "wikitext2_raw_test.txt.gz").write_bytes(gzip.compress(b" = Title = \n")[:-4])
    assert EVALUATIONS[chosen] in fails_with(workplace, capsys, "--eval", chosen, "--eval-data", str(texts))


def test_a_folder_of_texts_that_is_not_there(workplace, capsys):
    said = fails_with(workplace, capsys, "--eval", "piqa@end", "--eval-data", str(workplace / "nowhere"))
    assert "--eval-data" in said and "nowhere" in said


def test_a_run_directory_in_use(workplace, capsys):
    (workplace / "run").mkdir()
    (workplace / "run" / "config.json").write_text("{}")
    assert "in use" in fails_with(workplace, capsys)
    (workplace / "run" / "config.json").unlink()
    (workplace / "run" / "other.txt").write_text("mine")
    assert "holds no run" in fails_with(workplace, capsys, "--resume", "auto")


def test_a_start_that_failed_leaves_a_directory_that_can_be_used(workplace):
    """Its lock is all that it wrote."""
    (workplace / "run").mkdir()
    (workplace / "run" / ".lock").touch()
    check_usable(workplace / "run", resuming=False)
    (workplace / "run" / "config.json").touch()
    with pytest.raises(UserError, match="in use"):
        check_usable(workplace / "run", resuming=False)


def test_rules_of_parameters_that_are_not_there(workplace, capsys):
    said = fails_with(workplace, capsys, "--parameter-rules", "layers.*.site.gate:decay=false")
    assert "'layers.*.site.gate'" in said and "did you mean 'layers.*" in said


def test_bf16_weights_where_a_parameter_must_stay_in_fp32(workplace, capsys):
    (workplace / "ds.json").write_text(json.dumps(DS_CONFIG | {"bf16": {"enabled": True}}))
    said = fails_with(workplace, capsys, "--residual", "layer_scale")
    assert "ds.json: bf16.enabled" in said and "'layer_scale'" in said
    assert "layers.00.attention.site.scale" in said and "torch_autocast" in said
    said = fails_with(workplace, capsys, "--parameter-rules", "layers.01.mlp.site.norm.weight:fp32=true")
    assert "'vanilla'" in said and "layers.01.mlp.site.norm.weight" in said


def test_a_data_set_smaller_than_one_global_batch(workplace, capsys):
    said = fails_with(workplace, capsys, "--global-batch-size", "4096")
    assert "fewer than one global batch of 4096" in said


def test_a_checkpoint_that_is_not_there(workplace, capsys):
    assert "nowhere" in fails_with(workplace, capsys, "--resume", str(workplace / "nowhere"))
    assert "nowhere" in fails_with(workplace, capsys, "--init-from", str(workplace / "nowhere"))


def test_a_checkpoint_of_another_run(workplace, capsys):
    """Judged by its header alone, before any rank is joined."""
    from megaresid.config import parse
    from megaresid.training.checkpoint_format import Header, Marker, rank_file, write_record
    from megaresid.training.prepare import prepare

    options = {"--data": workplace / "data", "--run-dir": workplace / "run"}
    options |= {"--deepspeed_config": workplace / "ds.json", "--model": "tiny", "--context": "32"}
    options |= {"--global-batch-size": "8", "--steps": "3"}
    prepared = prepare(parse([str(part) for pair in options.items() for part in pair]))
    checkpoint = workplace / "step_00000002"
    checkpoint.mkdir()
    header = {"step": 2, "world_size": 1, "parameters": {"embed.tokens.weight": [50304, 128]}, "scalars": {}}
    header |= {"counters": {}, "engine": {}, "generators": [{}], "identity": prepared.identity | {"seed": 7}}
    records = {rank_file(0): write_tensors(checkpoint / rank_file(0), {}, {})}
    records["checkpoint.json"] = write_record(checkpoint / "checkpoint.json", Header(**header))
    write_record(checkpoint / "complete.json", Marker(files=records))

    said = fails_with(workplace, capsys, "--resume", str(checkpoint))
    assert "its seed is 7, this run's is 42" in said and "--init-from" in said
    said = fails_with(workplace, capsys, "--init-from", str(checkpoint))
    assert "it lacks parameter embed.positions.weight" in said
