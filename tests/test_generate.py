"""Sampling, and reading a run back."""

from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare

from data_prep.tokenizer import gpt2_encoding
from megaresid import generate as command
from megaresid.attention.softmax import Softmax
from megaresid.config import parse
from megaresid.errors import UserError
from megaresid.generate import _choose, generate
from megaresid.model.gpt import TokenEmbedding, build, canonical_parameters, set_step
from megaresid.saved_run import load_model, run_of
from megaresid.training.checkpoint_format import Header, Marker, write_record, write_tensors
from megaresid.training.run_dir import write_json

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.1, -0.2, 1.9])
DRAWS = 4000
OPTIONS = "--data data --run-dir run --deepspeed_config ds.json --model tiny --layers 2 --width 16 --context 8"


def draw(temperature: float, top_k: int) -> torch.Tensor:
    """How often each id was chosen in DRAWS draws."""
    generator = torch.Generator().manual_seed(1)
    chosen = [_choose(LOGITS, temperature, top_k, generator) for _ in range(DRAWS)]
    return torch.bincount(torch.tensor(chosen), minlength=len(LOGITS))


def follows(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Whether a chi-squared test lets the counts pass at 1 in 1,000; the seed is fixed, so the answer is too."""
    return chisquare(counts.numpy(), (probabilities * DRAWS).numpy()).pvalue > 1e-3


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().exp() / logits.double().exp().sum()


def test_temperature_0_and_top_1_take_the_largest():
    assert draw(0, 0)[2] == draw(0, 3)[2] == draw(1.0, 1)[2] == draw(5.0, 1)[2] == DRAWS


def test_samples_follow_the_softmax():
    assert follows(draw(1.0, 0), softmax(LOGITS))
    assert follows(draw(1.0, 100), softmax(LOGITS)), "a top_k above the vocabulary is all of it"
    assert follows(draw(2.0, 0), softmax(LOGITS / 2))
    assert not follows(draw(2.0, 0), softmax(LOGITS)), "the test can tell one temperature from another"


def test_top_k_keeps_to_the_likeliest():
    counts, likeliest = draw(3.0, 3), [2, 3, 5]
    assert counts.nonzero().flatten().tolist() == likeliest
    assert follows(counts[likeliest], softmax(LOGITS[likeliest] / 3))


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


@pytest.mark.parametrize("prompt", ["The module", "one that is longer than the context of eight tokens, by far", ""])
def test_greedy_text_is_the_likeliest_token_after_each_other(run, prompt):
    encoding, model = gpt2_encoding(), trained()
    ids = encoding.encode(prompt) if prompt else [50256]
    for _ in range(3):
        ids.append(int(model(torch.tensor([ids[-8:]]))[0][0, -1].argmax()))
    assert generate(run, prompt, tokens=3, temperature=0) == encoding.decode(ids)


MIXERS = {
    "softmax": (8, True),
    "softmax(positions=rope, kv_heads=1)": (None, True),
    "softmax(positions=none, window=3)": (None, True),
    "gated_delta_net": (None, True),
    "gla + softmax": (8, True),
    "test_generate:Forgetful": (8, False),
}
"""How many tokens of a text the model sees (None: all), and whether it goes on from what it kept."""


class Forgetful(Softmax):
    decodes = False


@pytest.mark.parametrize(("attention", "sees"), MIXERS.items(), ids=MIXERS)
def test_every_token_is_run_once_and_the_text_is_that_of_running_all_again(attention, sees, tmp_path, monkeypatch):
    """Within the context of eight and beyond it."""
    window, decodes = sees
    monkeypatch.setattr(TokenEmbedding, "forward", counting(TokenEmbedding.forward, lengths := []))
    options = f"{OPTIONS} --attention {attention.replace(' ', '')}"
    run, prompt, encoding = save_run(tmp_path / "run", options), "Each token once", gpt2_encoding()
    ids = encoding.encode(prompt)
    assert len(ids) == 3
    found = generate(run, prompt, tokens=9, temperature=0)
    once = [3, *[1] * 5] if window else [3, *[1] * 8]
    assert lengths == (once + [8] * (9 - len(once)) if decodes else [3, 4, 5, 6, 7, 8, 8, 8, 8])
    model = trained(options)
    for _ in range(9):
        ids.append(int(model(torch.tensor([ids[-(window or 99) :]]))[0][0, -1].argmax()))
    assert found == encoding.decode(ids)


def counting(forward, lengths: list[int]):
    """``forward`` that notes how many tokens each call gets."""

    def noting(self, idx, *arguments):
        lengths.append(idx.shape[1])
        return forward(self, idx, *arguments)

    return noting


def test_a_seed_gives_the_same_text_again(run):
    texts = [generate(run, "The", tokens=8, temperature=1.0, top_k=0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--tokens 0", "--tokens 0: must be at least 1"),
        ("--temperature -0.5", "--temperature -0.5: must be at least 0"),
        ("--temperature nan", "--temperature nan: must be at least 0"),
        ("--temperature inf", "--temperature inf: must be at least 0, and finite"),
        ("--top-k -1", "--top-k -1: must be at least 0"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_own_bound(run, capsys, monkeypatch, options, said):
    monkeypatch.setattr("sys.argv", ["generate", "--run", str(run), "--prompt", "x", *options.split()])
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
    with pytest.raises(UserError, match="mistyped: neither a run directory nor a checkpoint in one"):
        load_model(tmp_path / "mistyped")
    with pytest.raises(UserError, match="step_00000009: there is no such run directory or checkpoint"):
        load_model(run / "checkpoints" / "step_00000009")
