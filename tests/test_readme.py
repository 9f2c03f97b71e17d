"""What README.md says, held against the repository: its code, its paths, its options."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
import torch

from megaresid import variants
from megaresid.config import SECTIONS
from megaresid.model.check import check_states, check_users_mixers
from megaresid.model.flops import residual_cost
from megaresid.model.gpt import GPT, build, canonical_parameters, canonical_rules
from megaresid.model.plan import ModelPlan, component_name
from megaresid.model.presets import ModelShape
from megaresid.training.rules import overridden

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Options that the parser of megaresid.train takes before the configuration does.
BESIDE_THE_CONFIGURATION = {"--preset", "--config"}


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language, "" for those that name none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands_of(module: str) -> list[list[str]]:
    """The arguments of every command line in a block that starts ``module``."""
    lines = [line for block in blocks(README) for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if re.search(rf"(-m|--module) {module}\s", line)]
    return [words[words.index(module) + 1 :] for words in found]


@pytest.fixture
def my_variants(monkeypatch):
    """The variants of README, executed in one module as a user's file would be."""
    module = types.ModuleType("my_variants")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for code in blocks(section("Adding a variant"), "python"):
        exec(compile(code, "README.md", "exec"), module.__dict__)


def trained(residual: str, halved: bool = False):
    """A small model away from its initial values; ``halved``: with what every sublayer ends in multiplied by 1/2."""
    model = build(ModelPlan(ModelShape(layers=2, heads=2, width=16, context=8, vocab_size=50), residual=residual), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in canonical_parameters(model, model.prefixes).items():
            if name.endswith(".gain"):
                continue
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
            if halved and re.search(r"\.(o_proj|proj)\.", name):
                parameter /= 2
    return model.eval()


@pytest.mark.parametrize("name", ["Half", "Gain"])
def test_the_variants_of_the_readme_halve_every_update(name, my_variants):
    idx = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(2))
    logits, vanilla, expected = (
        model(idx)[0] for model in (trained(f"my_variants:{name}"), trained("vanilla"), trained("vanilla", halved=True))
    )
    assert (logits - vanilla).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_other_spellings_of_the_variants(my_variants):
    shape = ModelShape(layers=8, heads=2, width=16, context=8)
    plan = ModelPlan(shape, residual="3*vanilla + my_variants:Half")
    names = [component_name(plan.residual_of(layer)) for layer in range(8)]
    assert names == 2 * (3 * ["vanilla"] + ["my_variants:Half"])
    with torch.device("meta"):
        gain = ModelPlan(shape, residual="my_variants:Gain(start=1)")
        added = GPT(gain), GPT(ModelPlan(shape))
    added = [sum(parameter.numel() for parameter in model.parameters()) for model in added]
    assert added[0] - added[1] == residual_cost(gain).parameters == 16
    assert gain.residual_of(0).equals_vanilla == "exactly"


def test_the_table_of_variants_is_the_printed_one(capsys):
    variants.main(["--model", "gpt2-medium"])
    said = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    command, *shown = blocks(section("Residual variants"))[0].splitlines()
    assert command == "$ python -m megaresid.variants --model gpt2-medium"
    assert [line for line in shown if line not in [*said, "…"]] == [] and len(shown) > 10


def test_the_specs_and_rules_that_are_shown_are_valid():
    text = section("Residual variants")
    *_, example = blocks(text)
    specs = re.findall(r"--residual \"([^\"]+)\"|--residual ([a-z]\w*)", text)
    rules = shlex.split(example)[shlex.split(example).index("--parameter-rules") + 1 :]
    assert len(specs) == 3 and len(rules) == 2
    for quoted, plain in specs:
        with torch.device("meta"):
            model = GPT(ModelPlan(ModelShape(layers=4, heads=2, width=32, context=8), residual=quoted or plain))
    overridden(canonical_rules(model, model.prefixes, model.plan), rules)


def test_no_placeholder_is_left():
    assert re.findall(r"@@\w*", README) == []


def test_every_path_exists():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"data", "runs", "text"}  # what a user makes
    written = re.findall(r"(?<![\w/.-])[\w-]+/[\w./-]*\w", README)
    named = {path for path in written if path.split("/")[0] in folders} | set(re.findall(r"\]\(([^):#]+)\)", README))
    assert {"tests", "ds_configs", "launch"} <= {path.split("/")[0] for path in named}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_the_layout_names_what_is_there():
    (layout,) = blocks(section("Layout"))
    parent, missing = ROOT, []
    for line in layout.splitlines():
        names = re.split(r"\s{2,}", line.strip())[0].split()
        if not line.startswith(" "):
            parent = ROOT / names[0]
            names = ["."]
        missing += [f"{parent.name}/{name}" for name in names if not (parent / name).exists()]
    assert missing == []


def test_every_option_of_training_is_one():
    commands = commands_of("megaresid.train")
    assert len(commands) >= 2
    options = {word.split("=")[0] for words in commands for word in words if word.startswith("--")}
    # The text of this section speaks of training; --help is every command's, --nproc-per-node is torchrun's.
    spoken = re.findall(r"`[^`\n]*`", re.sub(r"^```.*?^```$", "", section("Training"), flags=re.MULTILINE | re.DOTALL))
    options |= {word for span in spoken for word in re.findall(r"--[\w-]+", span)} - {"--help", "--nproc-per-node"}
    options |= set(re.findall(r"`(--residual|--attention)\b", README))
    known = BESIDE_THE_CONFIGURATION | {f"--{key.replace('_', '-')}" for key in SECTIONS} | {"--deepspeed_config"}
    assert sorted(options - known) == []


def test_the_mixer_of_the_readme_trains_and_is_what_it_says(monkeypatch):
    """Alone, in a pattern, and inside another, as the text writes it."""
    module = types.ModuleType("my_mixers")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (code,) = blocks(section("Adding a mixer"), "python")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    shape = ModelShape(layers=4, heads=2, width=16, context=8, vocab_size=50)
    specs = re.findall(r'"([^"]*my_mixers:Mean[^"]*)"', section("Adding a mixer"))
    assert len(specs) == 3
    for spec in specs:
        plan = ModelPlan(shape, spec)
        check_states(plan)
        check_users_mixers(plan)
        model = build(plan, 0)
        idx = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    mixer = build(ModelPlan(shape, specs[0]), 0).parts[2].attention
    x = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    means = torch.stack([x[:, : t + 1].mean(1) for t in range(8)], 1)
    torch.testing.assert_close(mixer(x, ())[0], 0.5 * means @ mixer.o_proj.weight.T)
