"""The language of layer specs: parse, check, print, hash.

A component is a name with options, a pattern is components laid over the depth::

    softmax
    hyper_connections(streams=4, dynamic=true)
    my_module:MyMixer(option=1)
    blend(gla, causal_conv(kernel=4), gate=per_token_channel)
    3*gated_delta_net + softmax          three layers of one, then one of the other, repeated
    softmax | 3*gla + delta_net | softmax     the first and the last layer fixed, the rest repeated between them

Values are integers, floats, ``true``/``false``/``none``, words and components; those without a name come first. A
component's class declares its options as a pydantic model named ``Options``; whatever it does not declare is refused
here, before anything is built.
"""

import hashlib
import importlib
import json
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from megaresid import users_code
from megaresid.errors import UserError, suggestion

Value = "int | float | bool | str | None | Component"

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
WORD = r"[A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?"
TOKEN = re.compile(rf"\s*(?:(?P<number>{NUMBER})|(?P<word>{WORD})|(?P<mark>[()=,*+|-]))")
LONGEST_NUMBER = 100  # characters
DEEPEST = 20  # components in each other


class Options(BaseModel):
    """Base of every component's options: typed, immutable, finite, and closed to names it does not declare. The
    docstring under a field is its description. ``positional`` names the fields that may be given without their name."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    positional: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Component:
    """A name with the options that were written for it, e.g. ``gla(expand_k=0.5)``, and before them values without a
    name, e.g. ``blend(gla, softmax)``."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()
    arguments: tuple[Value, ...] = ()

    def __str__(self) -> str:
        written = [*map(write, self.arguments), *(f"{key}={write(value)}" for key, value in self.options)]
        return f"{self.name}({', '.join(written)})" if written else self.name


Terms = tuple[tuple[int, Component], ...]


@dataclass(frozen=True)
class Pattern:
    """Components in the order in which they are repeated over the depth, after the ``first`` and before the ``last``,
    which stand once."""

    terms: Terms
    first: Terms = ()
    last: Terms = ()

    def over(self, layers: int) -> list[Component]:
        """One component a layer: the terms repeated, their last repetition cut. Raises UserError where the model has
        fewer layers than the pattern fixes."""
        first, once, last = (
            [component for count, component in terms for _ in range(min(count, layers + 1))]
            for terms in (self.first, self.terms, self.last)
        )
        between = layers - len(first) - len(last)
        if between < 0:
            raise UserError(
                f"layer spec {str(self)!r} fixes more layers at its ends than the {layers} of the model: fix fewer"
            )
        return [*first, *(once[layer % len(once)] for layer in range(between)), *last]

    def components(self) -> list[Component]:
        """All that the pattern names, each term once."""
        return [component for _, component in (*self.first, *self.terms, *self.last)]

    def __str__(self) -> str:
        if not (self.first or self.last):
            return _print_terms(self.terms)
        return " | ".join(map(_print_terms, (self.first, self.terms, self.last))).strip()


def _print_terms(terms: Terms) -> str:
    return " + ".join(f"{count}*{component}" if count > 1 else str(component) for count, component in terms)


def write(value: Value) -> str:
    """A value as a user writes it."""
    plain = value is None or isinstance(value, bool | int | float)
    return json.dumps(value).replace("null", "none") if plain else str(value)


class _Reader:
    """Reads tokens of one spec from left to right; every error shows the text and the place."""

    def __init__(self, text: str):
        self.text, self.position, self.depth = text, 0, 0

    def fail(self, what: str):
        raise UserError(f"layer spec {self.text!r}: {what} at character {self.position + 1}")

    def peek(self) -> re.Match | None:
        return TOKEN.match(self.text, self.position)

    def take(self, kind: str, wanted: str | None = None) -> str | None:
        """The next token when it is of ``kind`` (and reads ``wanted``), else None and nothing is consumed."""
        token = self.peek()
        if token is None or token.lastgroup != kind or wanted not in (None, token[kind]):
            return None
        self.position = token.end()
        return token[kind]

    def at_end(self) -> bool:
        return not self.text[self.position :].strip()

    def number(self) -> str | None:
        number = self.take("number")
        if number is not None and len(number) > LONGEST_NUMBER:
            self.fail(f"a number of more than {LONGEST_NUMBER} characters ends")
        return number

    def value(self) -> Value:
        sign = self.take("mark", "-") or self.take("mark", "+") or ""
        if (number := self.number()) is not None:
            return int(sign + number) if number.isdigit() else float(sign + number)
        if sign:
            self.fail("expected a number")
        if (word := self.take("word")) is not None:
            if self.peek() and self.peek()["mark"] == "(":
                component = self.component_named(word)
                return component if component.options or component.arguments else word
            return {"true": True, "false": False, "none": None}.get(word.lower(), word)
        self.fail("expected a value")

    def component(self) -> Component:
        name = self.take("word")
        if name is None:
            self.fail("expected a name")
        return self.component_named(name)

    def component_named(self, name: str) -> Component:
        options: dict[str, Value] = {}
        arguments: list[Value] = []
        if self.take("mark", "("):
            if self.depth == DEEPEST:
                self.fail(f"more than {DEEPEST} components in each other")
            self.depth += 1
            while not self.take("mark", ")"):
                key = self.key()
                if key is None:
                    if options:
                        self.fail("expected option=value")
                    arguments.append(self.value())
                elif key in options:
                    self.fail(f"option {key!r} is given twice")
                else:
                    options[key] = self.value()
                if not self.take("mark", ",") and not (self.peek() and self.peek()["mark"] == ")"):
                    self.fail("expected ',' or ')'")
            self.depth -= 1
        return Component(name, tuple(options.items()), tuple(arguments))

    def key(self) -> str | None:
        """The name of an option and its '=', or None, and nothing is consumed."""
        start = self.position
        key = self.take("word")
        if key is not None and self.take("mark", "="):
            return key
        self.position = start
        return None

    def term(self) -> tuple[int, Component]:
        number = self.number()
        if number is None:
            return 1, self.component()
        if not number.isdigit() or int(number) < 1 or not self.take("mark", "*"):
            self.fail("expected a count of layers such as 3*name")
        return int(number), self.component()

    def terms(self) -> Terms:
        terms = [self.term()]
        while self.take("mark", "+"):
            terms.append(self.term())
        return tuple(terms)

    def end(self) -> Terms:
        """The terms of a pattern's end, of which there may be none."""
        nothing = self.at_end() or self.peek() and self.peek()["mark"] == "|"
        return () if nothing else self.terms()


def parse_pattern(text: str) -> Pattern:
    """Parse a pattern over the depth, ``3*a + b`` or ``first | 3*a + b | last``; raises UserError that shows the text
    and the place."""
    reader = _Reader(text)
    first, last = reader.end() if "|" in text else (), ()
    if "|" in text and not reader.take("mark", "|"):
        reader.fail("expected '+' or '|'")
    terms = reader.terms()
    if "|" in text:
        if not reader.take("mark", "|"):
            reader.fail("expected '+' or a second '|' (first | repeated | last)")
        last = reader.end()
    if not reader.at_end():
        reader.fail("unexpected text")
    return Pattern(terms, first, last)


class Preset(NamedTuple):
    """A component written out, and what it is in words."""

    text: str
    words: str


class Registry:
    """The named components of one package, subclasses of ``base`` (``module:Class``). Importing a file of the package
    registers what it defines, so that adding a component touches that file alone."""

    def __init__(self, kind: str, package: str, base: str):
        self.kind, self.package, self.base = kind, package, base
        self._classes: dict[str, type] = {}
        self._presets: dict[str, Preset] = {}
        self._imported = False

    def register(self, name: str) -> Callable[[type], type]:
        """Class decorator: ``name`` is what a user writes in a spec."""

        def add(cls: type) -> type:
            if name in self._classes:
                raise ValueError(f"two {self.kind} components are named {name!r}")
            cls.name = name
            self._classes[name] = cls
            return cls

        return add

    def preset(self, name: str, text: str, words: str) -> None:
        """Let ``name`` stand for the component that ``text`` writes out; ``words`` say what it is."""
        if name in self._presets:
            raise ValueError(f"two {self.kind} presets are named {name!r}")
        self._presets[name] = Preset(text, words)

    def classes(self) -> dict[str, type]:
        """All registered classes by name, in the order of their files."""
        self._import_all()
        return self._classes

    def presets(self) -> dict[str, Preset]:
        """What each preset's name stands for."""
        self._import_all()
        return self._presets

    def name_of(self, cls: type) -> str:
        """The registered name of a class, or the import path of a user's own (which may inherit a name)."""
        name = getattr(cls, "name", None)
        return name if self.classes().get(name) is cls else f"{cls.__module__}:{cls.__qualname__}"

    def _import_all(self) -> None:
        if self._imported:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._imported = True

    def resolve(self, component: Component) -> tuple[type, Options]:
        """The class that a component names, and its options with every default filled in and checked.

        ``module:Class`` is imported from the user's own code. Raises UserError for an unknown name (listing the
        known ones), a class of the user's that is none, an unknown option (listing the component's) and an ill-typed
        value (with type and default).
        """
        if ":" in component.name:
            cls = self._users_class(component.name)
        else:
            component = self._written_out(component)
            known = self.classes()
            if component.name not in known:
                names = known | self.presets()
                raise UserError(f"unknown {self.kind} {component.name!r}: {suggestion(component.name, names)}")
            cls = known[component.name]
        return cls, self._check(cls, component)

    def _written_out(self, component: Component) -> Component:
        if component.name not in self.presets():
            return component
        text = self.presets()[component.name].text
        if component.options or component.arguments:
            raise UserError(f"{self.kind} preset {component.name!r} takes no options: write out {text!r} and change it")
        ((_, written_out),) = parse_pattern(text).terms
        return written_out

    def users_own(self, path: str) -> Any:
        """What ``module:Class`` is, of this kind or not. Raises UserError where it cannot be imported."""
        users_code.check_origin(path.split(":")[0])
        try:
            return _import(path)
        except (ImportError, AttributeError) as error:
            raise UserError(f"cannot import {self.kind} {path!r}: {error}; is its folder on PYTHONPATH?") from error
        except (Exception, SystemExit) as error:  # the user's file, as it is executed
            raise UserError(f"cannot import {self.kind} {path!r}: {type(error).__name__}: {error}") from error

    def _users_class(self, path: str) -> type:
        cls = self.users_own(path)
        if not (isinstance(cls, type) and issubclass(cls, _import(self.base))):
            raise UserError(f"{self.kind} {path!r} is not a subclass of {self.base}: derive it from that class")
        if not (isinstance(cls.Options, type) and issubclass(cls.Options, Options)):
            raise UserError(f"{self.kind} {path!r}: its Options are not a subclass of {__name__}:Options: derive them")
        if cls not in users_code.CLASSES:
            users_code.CLASSES.append(cls)
        return cls

    def _given(self, cls: type, component: Component) -> dict[str, Value]:
        """The values by option, those without a name too."""
        names, values = cls.Options.positional, component.arguments
        if len(values) > len(names):
            takes = f"only {', '.join(names)}" if names else "no value"
            raise UserError(
                f"{self.kind} {component.name!r} takes {takes} without a name, and {len(values)} are given: write "
                "option=value"
            )
        given, written = dict(zip(names, values)), dict(component.options)
        if twice := given.keys() & written.keys():
            raise UserError(f"{self.kind} {component.name!r}: option {min(twice)!r} is given twice")
        return given | written

    def _check(self, cls: type, component: Component) -> Options:
        given = self._given(cls, component)
        try:
            return cls.Options(**given)
        except UserError as error:  # of a component inside this one
            raise UserError(f"{self.kind} {component.name!r}: {error}") from None
        except ValidationError as error:
            problem, fields = error.errors()[0], cls.Options.model_fields
            if not problem["loc"]:  # a check over several options
                raise UserError(f"{self.kind} {component}: {problem['msg']}") from None
            option = str(problem["loc"][0])
            if option not in fields:
                hint = suggestion(option, fields) if fields else "it takes no options"
                raise UserError(f"{self.kind} {component.name!r} has no option {option!r}: {hint}") from None
            field = fields[option]
            kind = type_name(field.annotation)
            if option not in given:
                raise UserError(f"{self.kind} {component.name!r}: {option} is missing (type {kind})") from None
            default = "no default" if field.is_required() else f"default {write(field.default)}"
            found = f"{option}={write(given[option])} is not valid"
            raise UserError(
                f"{self.kind} {component.name!r}: {found} ({problem['msg']}; type {kind}, {default})"
            ) from None


def type_name(annotation: Any) -> str:
    """The type of an option as a user reads it: the choices where there are some, and a class by its ``written_as``."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(write, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(type_name, get_args(annotation)))
    if annotation is NoneType:
        return "none"
    return getattr(annotation, "written_as", None) or getattr(annotation, "__name__", str(annotation))


def _import(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


def fingerprint(tree: Any) -> str:
    """sha256 of a JSON-able tree in canonical form: the same content, the same hash, on every machine."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
