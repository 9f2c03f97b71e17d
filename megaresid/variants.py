"""The residual variants and the mixers as tables: ``python -m megaresid.variants --model gpt2-medium``"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from megaresid.accelerator import choose_accelerator
from megaresid.errors import UserError, exits_with_user_errors, suggestion
from megaresid.model.presets import PRESETS
from megaresid.users_code import mistakes_told

if TYPE_CHECKING:
    from megaresid.model.describe import Description, Option, ParameterRule
    from megaresid.model.describe_mixers import MixerDescription

SCHEMA = 2
WIDTH = 120  # where the output is not a terminal
NAMES_WHOLE = 80  # so wide a terminal has room for the names of parameters in one piece

Columns = dict[str, Callable[[str, int], str]]
"""Headings, and how their cells are aligned."""

COLUMNS: Columns = {
    "variant": str.ljust,
    "parameters": str.rjust,
    "FLOPs": str.rjust,
    "memory": str.rjust,
    "a token": str.rjust,
    "start": str.ljust,
    "state": str.ljust,
}
MIXER_COLUMNS: Columns = {
    "mixer": str.ljust,
    "parameters": str.rjust,
    "FLOPs": str.rjust,
    "carried": str.rjust,
    "a token": str.rjust,
    "positions": str.ljust,
}
LEGEND = """\
Below each name: its options with their defaults, the paper, whether the code is the paper's (exact, reconstructed \
where it is silent, or own), and what it cannot be trained with.
parameters, FLOPs and memory are added to vanilla over all layers of {model}: FLOPs of a forward pass, memory that the \
backward pass needs (fp32, no recomputation) in percent and in bytes a token. start: whether the model equals vanilla \
before the first step. state: the tensors that cross the middle of the depth, their shapes after batch and time, and \
the number of tensors at its end."""
MIXER_LEGEND = """\
Mixers, for --attention of megaresid.train. Below each name: its options with their defaults, or what it stands for; \
the paper; whether the code is the paper's; what it needs, and what it cannot be trained with.
parameters and FLOPs are added to softmax attention over all layers of {model}, FLOPs of a forward pass in percent of \
vanilla's whole model. carried: bytes that a text takes while it is generated (fp32), and how many more with each of \
its tokens. positions: whether it needs position embeddings. -: by the mixers that it is given, or not known on every \
machine.
One in full: python -m megaresid.variants NAME"""


def variants(
    name: Annotated[str, tyro.conf.Positional] = "",
    model: str = "gpt2-medium",
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Print what each residual variant and each mixer is, adds, carries and excludes.

    Parameters are counted; FLOPs and memory are computed from each one's closed forms, which the tests hold against
    counts. With a name, as --residual or --attention takes it, that one is shown in full: equation, options, costs and
    the rules of its parameters, by the names that --parameter-rules of megaresid.train changes.

    Args:
        name: One of them, e.g. vanilla, gla, "name(option=1)" or my_module:MyVariant; all if left out.
        model: Costs are those at this shape: tiny, gpt2, gpt2-medium, gpt2-large or gpt2-xl.
        json: Print JSON for programs; it names its schema version.
    """
    if model not in PRESETS:
        raise UserError(f"--model {model}: {suggestion(model, PRESETS)}")
    choose_accelerator()
    with mistakes_told():
        _show(name, model, as_json=json)


def _show(name: str, model: str, as_json: bool) -> None:
    # After the options are parsed: --help must not wait for torch.
    from megaresid.model import describe, describe_mixers

    shape = PRESETS[model]
    is_mixer = bool(name) and describe_mixers.names_a_mixer(name)
    if not name:
        found, mixers = describe.describe_all(shape), describe_mixers.describe_all_mixers(shape)
    elif is_mixer:
        found, mixers = [], [describe_mixers.describe_mixer(name, shape)]
    else:
        found, mixers = [describe.describe(name, shape)], []
    if as_json:
        _print_json(found, mixers, model)
    elif is_mixer:
        rules = describe_mixers.mixer_rules(name, shape)
        _print_one(mixers[0], _mixer_facts(mixers[0], model), describe_mixers.mixer_documentation(name), rules)
    elif name:
        rules = describe.rules_beside_vanilla(describe.ModelPlan(shape, residual=name))
        _print_one(found[0], _facts(found[0], model), describe.documentation(name, shape), rules)
    else:
        _print_tables(found, mixers, model)


def _print_json(found: list["Description"], mixers: list["MixerDescription"], model: str) -> None:
    tree = {"schema": SCHEMA, "model": model, "shape": PRESETS[model].model_dump()}
    tree |= {"variants": [asdict(one) for one in found], "mixers": [asdict(one) for one in mixers]}
    print(json.dumps(tree, indent=2))


def _console() -> Console:
    """It prints what it is given: no markup, no highlighting; colours on a terminal only."""
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=WIDTH)


def _print_tables(found: list["Description"], mixers: list["MixerDescription"], model: str) -> None:
    console = _console()
    _print_table(console, COLUMNS, [(_cells(one), _below(one)) for one in found])
    console.print()
    console.print(LEGEND.format(model=model))
    console.print()
    _print_table(console, MIXER_COLUMNS, [(_mixer_cells(one), _below_mixer(one)) for one in mixers])
    console.print()
    console.print(MIXER_LEGEND.format(model=model))


def _print_table(console: Console, columns: Columns, rows: list[tuple[tuple[str, ...], str]]) -> None:
    """Two lines for each: its numbers in columns, and below them what is text."""
    widths = [max(map(len, column)) for column in zip(columns, *(cells for cells, _ in rows))]

    def line(cells) -> str:
        return "  ".join(align(cell, width) for cell, width, align in zip(cells, widths, columns.values())).rstrip()

    console.print(line(columns), style="bold")
    for cells, below in rows:
        console.print(line(cells))
        console.print(Padding(Text(below, style="dim"), (0, 0, 0, 4), expand=False))


def _cells(one: "Description") -> tuple[str, ...]:
    return (
        one.name,
        _signed(one.added_parameters),
        _percent(one.added_flops_percent),
        _percent(one.added_bytes_percent),
        _signed(one.added_bytes),
        one.equals_vanilla,
        f"{_tensors(one)}; {one.tensors_at_end}",
    )


def _mixer_cells(one: "MixerDescription") -> tuple[str, ...]:
    built = one.added_parameters is not None
    if one.decodes or not built:
        carried = [f"{each:,}" if built else "-" for each in (one.carried_bytes, one.carried_bytes_a_token)]
    else:
        carried = ["run again", "-"]
    return (
        one.name,
        _signed(one.added_parameters) if built else "-",
        _percent(one.added_flops_percent) if built else "-",
        *carried,
        _positions(one),
    )


def _below(one: "Description") -> str:
    return _joined(_options_text(one.options), one.paper, _short(one.fidelity), _without(one.incompatible))


def _below_mixer(one: "MixerDescription") -> str:
    needs = one.needs and f"needs {one.needs}"
    told = one.paper, _short(one.fidelity), needs, _without(one.incompatible)
    return _joined(one.stands_for or _options_text(one.options), *told)


def _options_text(options: tuple["Option", ...]) -> str:
    told = (option.name if option.required else f"{option.name}={_value(option.value)}" for option in options)
    return f"({', '.join(told)})" if options else ""


def _short(fidelity: str) -> str:
    return fidelity.partition(":")[0]


def _without(incompatible: tuple[str, ...]) -> str:
    return f"not with {_list(incompatible)}" if incompatible else ""


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def _positions(one: "MixerDescription") -> str:
    return {True: "learned", False: "none", None: "-"}[one.positions]


Facts = list[tuple[str, str]]


def _facts(one: "Description", model: str) -> Facts:
    return [
        ("paper", one.paper),
        ("fidelity", one.fidelity),
        ("start", f"equals vanilla: {one.equals_vanilla}"),
        ("not with", _list(one.incompatible) or "-"),
        ("parameters", f"{_signed(one.added_parameters)} over all layers of {model}"),
        ("FLOPs", _amount(one.added_flops, "per token and forward pass", one.added_flops_percent)),
        ("memory", _amount(one.added_bytes, "bytes per token", one.added_bytes_percent)),
        ("state", f"{_tensors(one)} at mid-depth, {one.tensors_at_end} at the end"),
    ]


def _mixer_facts(one: "MixerDescription", model: str) -> Facts:
    parameters = flops = carried = "-"
    if one.added_parameters is not None:
        parameters = f"{_signed(one.added_parameters)} beside softmax, over all layers of {model}"
        flops = _amount(one.added_flops, "per token and forward pass", one.added_flops_percent)
    if not one.decodes:
        carried = "nothing: a text is run again for every token"
    elif one.carried_bytes is not None:
        carried = f"{one.carried_bytes:,} bytes for a text, {one.carried_bytes_a_token:,} more with each of its tokens"
    return [
        *([("stands for", one.stands_for)] if one.stands_for else []),
        ("paper", one.paper),
        ("fidelity", one.fidelity),
        ("needs", one.needs or "-"),
        ("not with", _list(one.incompatible) or "-"),
        ("positions", _positions(one)),
        ("parameters", parameters),
        ("FLOPs", flops),
        ("carried", carried),
    ]


def _print_one(
    one: "Description | MixerDescription", facts: Facts, documentation: str, rules: list["ParameterRule"]
) -> None:
    console = _console()
    console.print(one.name, style="bold")
    console.print(documentation + "\n")
    grid = Table("fact", Column("", overflow="fold"), box=None, pad_edge=False, show_header=False)
    for fact in facts:
        grid.add_row(*fact)
    console.print(grid)
    if one.options:
        console.print("\nOptions", style="bold")
        table = _folding(Column("option", overflow="fold"), "type", "value", "default", "")
        for option in one.options:
            # What is required has no default, and its class by itself no value.
            given = "-" if option.required and option.value is None else _value(option.value)
            default = "-" if option.required else _value(option.default)
            table.add_row(option.name, option.type, given, default, option.description)
        console.print(table)
    if rules:
        console.print("\nParameters that vanilla has not, or treats otherwise", style="bold")
        treatment = "starts from", "decays", "lr", "epsilon", "fp32"
        table = _folding(Column("parameter", overflow="fold", no_wrap=console.width >= NAMES_WHOLE), *treatment)
        for rule in rules:
            multipliers = f"x{rule.lr_multiplier:g}", f"x{rule.epsilon_multiplier:g}"
            table.add_row(rule.names, rule.start, _yes(rule.decay), *multipliers, _yes(rule.fp32))
        console.print(table)


def _folding(first: Column, *headings: str) -> Table:
    """A table that breaks its cells where the terminal is narrow, and cuts none."""
    columns = first, *(Column(heading, overflow="fold") for heading in headings)
    return Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)


def _tensors(one: "Description") -> str:
    """Of what is many, the number, the first and the last."""
    tensors = [f"{tensor.name}[{', '.join(map(str, tensor.shape))}]" for tensor in one.state]
    return ", ".join(tensors) if len(tensors) < 3 else f"{len(tensors)}: {tensors[0]} … {tensors[-1]}"


def _amount(value: int | None, unit: str, percent: float | None) -> str:
    return "not declared" if value is None else f"{_signed(value)} {unit}, {_percent(percent)}"


def _percent(value: float) -> str:
    """To two digits: the closed forms promise 5%."""
    return "0" if value == 0 else f"{value:+.2g}%" if abs(value) < 10 else f"{value:+.0f}%"


def _signed(value: int) -> str:
    return f"{value:+,}" if value else "0"


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value).replace("null", "none")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _list(texts: tuple[str, ...]) -> str:
    return ", ".join(texts)


@exits_with_user_errors
def main(arguments: list[str] | None = None) -> None:
    tyro.cli(variants, prog="python -m megaresid.variants", args=sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
