"""Any layer of flash-linear-attention as a mixer, for those that are not of the recurrence's algebra.

Its constructor, forward pass and initial values are fla's own; the names of its parameters stand below ``layer``.
"""

import importlib
import inspect
import json
import sys
from functools import cache
from typing import Any

import torch
from pydantic import ConfigDict
from torch import nn

from megaresid import spec
from megaresid.attention.cache import Cache
from megaresid.attention.kernels.routes import INSTALL, check_installed, facts_of
from megaresid.attention.mixer import MIXERS, Inputs, Mixer, Side, SideSpec
from megaresid.errors import UserError, suggestion
from megaresid.model.init import Rule, owned_rules
from megaresid.model.presets import ModelShape

V_FIRST = "v_first"
"""RWKV-7's values of the first layer, in the side channel."""

NOT_ALONE = ("YOCOCrossAttention", "YOCOSharedKVBuilder")
"""Layers that are parts of another's: they take or give keys and values."""

SCALAR_GATED = tuple(
    f"fla.ops.{name}"
    for name in ("comba", "gated_delta_product", "gated_delta_rule", "precond_gated_delta_rule", "simple_gla")
)
"""Where the kernels are that Hopper and some versions of Triton get wrong."""


class Options(spec.Options):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, int | float | bool | str | None]

    positional = ("layer",)

    layer: str
    """The name of a class of fla.layers, e.g. RWKV7Attention; the other options are those of its constructor."""


@MIXERS.register("fla")
class FlaLayer(Mixer):
    """A layer of flash-linear-attention by the name of its class: ``fla(HGRNAttention, expand_ratio=1)``.

    Its width, its place in the depth and, where its constructor has a number for them, heads and their width are the
    model's unless given. It runs on a GPU alone. Of what it returns the output counts, and RWKV-7's first values, which
    go on to later layers. Parameters that it marks ``_no_weight_decay`` are not decayed and stay in fp32.
    """

    citation = "the layer's, in flash-linear-attention"
    fidelity = "exact: the layer is flash-linear-attention's"
    needs = "a GPU and flash-linear-attention"
    reads = (V_FIRST,)
    Options = Options

    def __init__(self, shape: ModelShape, options: Options, layer: int, entering: SideSpec = ()):
        super().__init__(shape, options, layer, entering)
        cls = layer_class(options.layer)
        names = [name for name, _ in entering]
        self.layers = shape.layers
        self.gives_v_first = _takes_v_first(cls) and V_FIRST not in names
        self.v_first_at = names.index(V_FIRST) if _takes_v_first(cls) and V_FIRST in names else None
        # fla's first layer is the one numbered 0, and in a model of several mixers another may be that.
        number = 0 if self.gives_v_first else max(layer, 1) if self.v_first_at is not None else layer
        self.arguments = arguments_of(cls, shape, options, number)
        self.layer = cls(**self.arguments)

    @classmethod
    def check(cls, shape: ModelShape, options: Options) -> None:
        """Raises UserError without a GPU and fla, for an unknown layer or option, and where the layer refuses them."""
        what = f"attention fla({options.layer})"
        if not torch.cuda.is_available():
            raise UserError(f"{what} runs on a GPU, and there is none here: choose a mixer that is not wrapped, as gla")
        facts = facts_of(torch.device("cuda"))
        check_installed(facts, what)
        check_layer(shape, options)
        if facts.miscompile and uses_scalar_gates(layer_class(options.layer)):
            raise UserError(
                f"{what} has kernels that Triton {facts.triton} gets wrong on Hopper: choose a mixer that is not "
                'wrapped, or pip install "triton>=3.7.1"'
            )

    @classmethod
    def side_spec(cls, shape: ModelShape, options: Options, entering: SideSpec) -> SideSpec:
        if not _takes_v_first(layer_class(options.layer)) or V_FIRST in [name for name, _ in entering]:
            return entering
        return (*entering, (V_FIRST, (_values(shape, options),)))

    @classmethod
    def flops_per_token(cls, shape: ModelShape, options: Options) -> int:
        """A lower bound: the products with its matrices and its convolutions. What its kernels do between tokens is
        not known here."""
        return _products(options.model_dump_json(), shape)

    def parameter_rules(self) -> dict[str, Rule]:
        """A layer with an initialisation of its own (RWKV's) keeps it. Of the others the weights of plain Linears start
        as GPT-2's, with their biases 0, unless they are marked ``_no_reinit``; all else is left as constructed."""
        start = _Construction(type(self.layer), self.arguments)
        rules = {}
        for name, parameter in self.layer.named_parameters():
            marked = getattr(parameter, "_no_weight_decay", False)
            matrix = name.endswith("weight") and sum(size > 1 for size in parameter.shape) > 1
            rules[name] = Rule(Constructed(start, name), decay=matrix and not marked, fp32=marked)
        if not hasattr(self.layer, "_initialize_weights"):
            rules |= self._linear_rules()
        return {f"layer.{name}": rule for name, rule in rules.items()}

    def _linear_rules(self) -> dict[str, Rule]:
        rules = {}
        for path, module in self.layer.named_modules():
            if type(module) is not nn.Linear or getattr(module.bias, "_no_reinit", False):
                continue
            # Mamba calls the output projection out_proj.
            prefix = "attention.o_proj" if path in ("o_proj", "out_proj") else path
            known = owned_rules(module, self.layers, prefix)
            rules |= {f"{path}.{name}": known[name] for name, _ in module.named_parameters()}
        return rules

    def forward(self, x: Inputs, side: Side, cache: Cache | None = None) -> tuple[torch.Tensor, Side]:
        if isinstance(x, torch._subclasses.FakeTensor):  # model/check.py wants the shapes alone; kernels have none
            first = x.new_empty(*x.shape[:2], self.layer.value_dim) if self.gives_v_first else None
            return x.clone(), side if first is None else (*side, first)
        from megaresid.attention.kernels.calls import apart  # which takes long to import

        keywords = {} if self.v_first_at is None else {"v_first": side[self.v_first_at]}
        result = apart(self.layer, x, **keywords)
        output = result if isinstance(result, torch.Tensor) else result[0]
        return output, (*side, result[3]) if self.gives_v_first else side


def layer_class(name: str) -> type[nn.Module]:
    """A class of fla.layers. Raises UserError for a name that it has not."""
    try:
        layers = importlib.import_module("fla.layers")
    except ImportError as error:
        raise UserError(f"attention fla({name}): cannot import fla.layers ({error}): {INSTALL}") from error
    if name not in layers.__all__:
        raise UserError(f"attention fla: unknown layer {name!r}: {suggestion(name, layers.__all__)}")
    if name in NOT_ALONE:
        raise UserError(f"attention fla({name}): the layer is a part of another: choose a whole one, as HGRNAttention")
    return getattr(layers, name)


FILLED = ("self", "kwargs", "hidden_size", "d_model", "layer_idx", "num_hidden_layers")
"""Arguments of a constructor that the model gives."""


def check_layer(shape: ModelShape, options: Options) -> None:
    """Raises UserError for an option that the layer has not, and for what its constructor refuses; nothing is
    allocated. What is not in the signature many layers swallow."""
    cls, what = layer_class(options.layer), f"attention fla({options.layer})"
    known = [name for name in inspect.signature(cls).parameters if name not in FILLED]
    for name in options.model_extra:
        if name not in known:
            raise UserError(f"{what} has no option {name!r}: {suggestion(name, known)}")
    if _takes_v_first(cls) and shape.layers < 2:
        raise UserError(f"{what}: its initial values are for 2 layers or more: give the model more than {shape.layers}")
    try:
        with torch.device("meta"):
            cls(**arguments_of(cls, shape, options, layer=0))
    except Exception as error:  # of the layer's own asserts and of libraries that it misses
        said = " ".join(str(error).split()) or type(error).__name__
        mend = "install it" if isinstance(error, ImportError) else "change its options"
        raise UserError(f"{what} cannot be built for width {shape.width}: {said}: {mend}") from error


def arguments_of(cls: type[nn.Module], shape: ModelShape, options: Options, layer: int) -> dict[str, Any]:
    """What the constructor is given: the user's options and, where it takes them, the model's sizes."""
    parameters = inspect.signature(cls).parameters
    model = {"hidden_size": shape.width, "layer_idx": layer, "num_hidden_layers": shape.layers}
    given = {name: value for name, value in model.items() if name in parameters} | options.model_extra
    # None, or no default, is a layer that derives it from others of its options.
    derived = {name for name, parameter in parameters.items() if parameter.default is None}
    if "num_heads" in parameters and "num_heads" not in derived:
        given.setdefault("num_heads", shape.heads)
        sizes = {"num_key_value_heads": given["num_heads"], "head_dim": shape.width // given["num_heads"]}
        for name in sizes.keys() & parameters.keys() - derived:
            if "expand" not in parameters:  # Mamba's heads are of another width than the model
                given.setdefault(name, sizes[name])
    return given


def uses_scalar_gates(cls: type[nn.Module]) -> bool:
    """Whether the file of a layer imports an operator of ``SCALAR_GATED``."""
    found = vars(sys.modules[cls.__module__]).values()
    return any((getattr(one, "__module__", None) or "").startswith(SCALAR_GATED) for one in found)


def _takes_v_first(cls: type[nn.Module]) -> bool:
    return V_FIRST in inspect.signature(cls.forward).parameters


def _values(shape: ModelShape, options: Options) -> int:
    return options.model_extra.get("value_dim") or shape.width


@cache
def _products(options: str, shape: ModelShape) -> int:
    tree = json.loads(options)
    cls = layer_class(tree["layer"])
    with torch.device("meta"):
        layer = cls(**arguments_of(cls, shape, Options(**tree), layer=1))
    return sum(2 * parameter.numel() for parameter in layer.parameters() if sum(n > 1 for n in parameter.shape) > 1)


class _Construction:
    """A layer constructed for its initial values when the first of them is asked for, from that one's seed."""

    def __init__(self, cls: type[nn.Module], arguments: dict[str, Any]):
        self._cls, self._arguments, self._values = cls, arguments, None

    def value(self, name: str, seed: int) -> torch.Tensor:
        if self._values is None:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                self._values = dict(self._cls(**self._arguments).named_parameters())
        return self._values[name].detach()


class Constructed:
    """What the constructor of fla's layer leaves in the parameter ``name``."""

    def __init__(self, construction: _Construction, name: str):
        self._construction, self._name = construction, name

    def draw(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        return self._construction.value(self._name, generator.initial_seed())

    def __str__(self) -> str:
        return "as constructed"
