"""The command that samples, and reading a run back."""

import io
import os
from pathlib import Path

import pytest
import torch
from made_runs import write_tensors

from data_prep.tokenizer import gpt2_encoding
from megaresid import generate as command
from megaresid import sampling
from megaresid.config import parse
from megaresid.errors import UserError
from megaresid.generate import generate
from megaresid.model.gpt import build, canonical_parameters, set_step
from megaresid.sampling import Sampling, continuation
from megaresid.saved_run import load_model, run_of
from megaresid.training.checkpoint_format import Header, Marker, write_record
from megaresid.training.run_dir import write_json

OPTIONS = "--data data --run-dir run --deepspeed_config ds.json --model tiny --layers 2 --width 16 --context 8"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory whose one checkpoint holds the parameters of ``trained``."""
    return save_run(tmp_path_factory.mktemp("runs") / "first", OPTIONS)


def save_run(run: Path, options: str) -> Path:
    checkpoint = run / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    write_json(run / "config.json", {"schema": 1, **parse(options.split()).flat()})
    parameters = canonical_parameters(model := trained(options), model.prefixes)
    tensors = {("parameter", name): parameter.detach().flatten() for name, parameter in parameters.items()}
    runs = {name: (0, parameter.numel()) for name, parameter in parameters.items()}
    header = {"step": 3, "world_size": 1, "scalars": {}, "counters": {}, "engine": {}, "generators": [{}]}
    header |= {"parameters": {name: list(parameter.shape) for name, parameter in parameters.items()}, "identity": {}}
    records = {"rank_00000.safetensors": write_tensors(checkpoint / "rank_00000.safetensors", tensors, runs)}
    records["checkpoint.json"] = write_record(checkpoint / "checkpoint.json", Header(**header))
    write_record(checkpoint / "complete.json", Marker(files=records))
    return run


def trained(options: str = OPTIONS):
    """A model with every parameter away from its initial value."""
    config = parse(options.split())
    model = build(config.plan(), seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_the_loaded_model_is_the_saved_one(run):
    idx = torch.randint(50257, (2, 8), generator=torch.Generator().manual_seed(7))
    expected, _ = trained()(idx)
    for path in (run, run / "checkpoints", run / "checkpoints" / "step_00000003"):
        model = load_model(path)
        assert not model.training
        assert torch.equal(model(idx)[0], expected)


def test_the_loaded_model_is_at_the_step_of_its_checkpoint(tmp_path):
    """Where the model depends on the step: 3 of a warm-up of 4 steps."""
    options = f"{OPTIONS} --residual pro_res(warmup=4)"
    idx = torch.randint(50257, (2, 8), generator=torch.Generator().manual_seed(7))
    loaded, model = load_model(save_run(tmp_path / "run", options)), trained(options)
    set_step(model, 3)
    assert torch.equal(loaded(idx)[0], model(idx)[0])
    set_step(model, 4)
    assert not torch.equal(loaded(idx)[0], model(idx)[0])


def test_a_relative_checkpoint_finds_its_run(run, monkeypatch):
    monkeypatch.chdir(run / "checkpoints")
    assert run_of(Path("step_00000003")) == run_of(Path(".")) == run_of(Path("..")) == run.resolve()
    assert load_model(Path("step_00000003")).shape.width == 16


def text(capsys, run: Path, prompt: str | None, **options) -> str:
    """What the command writes to standard output."""
    capsys.readouterr()
    generate(run, prompt, **options)
    return capsys.readouterr().out


@pytest.mark.parametrize("prompt", ["The module", "one that is longer than the context of eight tokens, by far", None])
def test_greedy_text_is_the_likeliest_token_after_each_other(run, capsys, prompt):
    encoding, model = gpt2_encoding(), trained()
    ids = encoding.encode(prompt) if prompt else [50256]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids[-8:]]))[0][0, -1].argmax()))
    assert text(capsys, run, prompt, tokens=3, temperature=0) == encoding.decode(ids[prompt is None :]) + "\n"


def test_the_text_is_that_of_the_options(run, capsys):
    model, ids = trained(), gpt2_encoding().encode_ordinary("The")
    chosen = continuation(model, ids, 9, Sampling(1.5, 30, 0.7), seed=4)
    expected = gpt2_encoding().decode([*ids, *chosen]) + "\n"
    options = {"tokens": 9, "temperature": 1.5, "top_k": 30, "top_p": 0.7, "seed": 4}
    assert text(capsys, run, "The", **options) == expected
    for other in ({"tokens": 8}, {"temperature": 0.5}, {"top_k": 0}, {"top_p": 0.05}, {"seed": 5}):
        assert text(capsys, run, "The", **(options | other)) != expected


def test_a_seed_gives_the_same_text_again(run, capsys):
    texts = [text(capsys, run, "The", tokens=8, temperature=1.0, top_k=0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_prompt_is_ordinary_text_whatever_it_says(run, capsys, monkeypatch):
    monkeypatch.setattr(sampling, "continuation", lambda model, ids, *_: given.append(ids) or iter([0]))
    given = []
    assert text(capsys, run, "a<|endoftext|>b", tokens=1) == "a<|endoftext|>b!\n"
    assert 50256 not in given[0] and gpt2_encoding().decode(given[0]) == "a<|endoftext|>b"
    assert text(capsys, run, "\udcff", tokens=1) == "\ufffd!\n", "an argument that is no UTF-8"


@pytest.mark.parametrize("prompt", ["None", "--tokens", "-1", " "])
def test_the_command_takes_any_prompt(run, capsys, monkeypatch, prompt):
    monkeypatch.setattr("sys.argv", ["generate", "--run", str(run), f"--prompt={prompt}", "--tokens", "1"])
    command.main()
    assert capsys.readouterr().out.startswith(prompt)


class Recorder(io.StringIO):
    """A standard output that keeps what came with each write, and what was there when the buffer was handed on."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.getvalue())


MANY_BYTES = "né 日本語 — 🙂🏳️‍🌈 ok"


@pytest.mark.parametrize("cut", ["nowhere", "at its end", "at its start"])
def test_a_token_is_written_as_soon_as_its_characters_are_whole(run, monkeypatch, cut):
    encoding = gpt2_encoding()
    ids = encoding.encode_ordinary(MANY_BYTES * 2)
    broken = [n for n, token in enumerate(ids) if "\ufffd" in encoding.decode([token])]
    ids = ids[broken[0] + 1 if cut == "at its start" else 0 : broken[-1] if cut == "at its end" else None]
    written = []

    def tokens(*_):
        for token in ids:
            written.append(out.flushed[-1])
            yield token

    monkeypatch.setattr(sampling, "continuation", tokens)
    monkeypatch.setattr("sys.stdout", out := Recorder())
    generate(run, MANY_BYTES, tokens=len(ids))
    assert written == [MANY_BYTES + settled(encoding.decode_bytes(ids[:n])) for n in range(len(ids))]
    assert out.getvalue() == MANY_BYTES + encoding.decode(ids) + "\n" == out.flushed[-1]
    assert (cut == "nowhere") == ("\ufffd" not in out.getvalue())


def settled(known: bytes) -> str:
    """As much of the text as no bytes to come can change."""
    to_come = [b"", *(bytes([first]) + rest * b"\x80" for first in (0x80, 0x90, 0xA0) for rest in range(3))]
    return os.path.commonprefix([(known + following).decode(errors="replace") for following in to_come])


def test_what_a_user_cannot_see_in_the_text_is_noted(run, capsys, monkeypatch):
    generate(run, "a b c d e f g h i", tokens=2)
    noted = capsys.readouterr().err
    assert noted == "note: the prompt has 9 tokens: the model goes on from the last 8, all that it sees\n"
    generate(run, "a b c d e f g h", tokens=2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Sampling, "choose", lambda *_: next(chosen))
    chosen = iter([0, 0, 50256])
    generate(run, "x", tokens=5)
    assert capsys.readouterr() == ("x!!\n", "note: the document ends here, after 2 of 5 tokens\n")


def test_without_positions_a_long_prompt_is_seen_whole_and_nothing_is_noted(tmp_path, capsys):
    run = save_run(tmp_path / "run", f"{OPTIONS} --attention softmax(positions=rope)")
    generate(run, "a b c d e f g h i j k", tokens=1)
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_the_text_without_a_traceback(run, capsys, monkeypatch):
    def interrupted(*_):
        yield 0
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "continuation", interrupted)
    monkeypatch.setattr("sys.argv", ["generate", "--run", str(run), "--prompt", "x"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 130
    assert capsys.readouterr() == ("x!\n", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tokens 0", "--tokens 0: must be at least 1"),
        ("--temperature -0.5", "--temperature -0.5: must be at least 0"),
        ("--temperature nan", "--temperature nan: must be at least 0"),
        ("--temperature inf", "--temperature inf: must be at least 0, and finite"),
        ("--temperature 1 --prompt=", "--prompt '': it is empty; give a text, or leave --prompt out"),
        ("--top-p 0", "--top-p 0.0: must be above 0, and at most 1"),
        ("--top-p 1.1", "--top-p 1.1: must be above 0"),
        ("--top-p nan", "--top-p nan: must be above 0"),
        ("--seed -1", "--seed -1: must be at least 0, and below 2^64"),
        ("--seed 18446744073709551616", "--seed 18446744073709551616: must be at least 0"),
        ("--top-k -1", "--top-k -1: must be at least 0"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_own_bound(run, capsys, monkeypatch, options, said):
    monkeypatch.setattr("sys.argv", ["generate", "--run", str(run), *options.split()])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {said}") and "\n" not in error


def test_no_checkpoint_yet_and_no_run(run, tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    (young / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(UserError, match="young: there is no complete checkpoint yet"):
        load_model(young)
    with pytest.raises(UserError, match="mistyped: neither a run directory, nor a checkpoint in one, nor an exp"):
        load_model(tmp_path / "mistyped")
    with pytest.raises(UserError, match="step_00000009: there is no such run directory or checkpoint"):
        load_model(run / "checkpoints" / "step_00000009")
