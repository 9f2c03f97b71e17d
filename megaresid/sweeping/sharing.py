"""Whether the runs of a sweep start alike: those of one seed share the order of their data and the initial values of
all parameters that they have in common, bit for bit, as their ``initial.json`` says."""

from collections import Counter
from pathlib import Path
from typing import Any

from megaresid.errors import UserError
from megaresid.training.run_dir import read_json

FILE = "initial.json"


class Sharing:
    """The runs that were found to start alike; each new one is held against them."""

    def __init__(self):
        self._orders: dict[int, tuple[str, dict[str, Any]]] = {}
        self._values: dict[tuple, tuple[str, str]] = {}
        self._rules: dict[tuple, tuple[str, str]] = {}
        self._seen: set[str] = set()
        self.declared: dict[str, str] = {}
        """By variant: that it starts parameters otherwise than another by a rule of its own, which is no fault."""

    def has_seen(self, name: str) -> bool:
        return name in self._seen

    def add(self, name: str, variant: str, seed: int, initial: dict[str, Any]) -> None:
        """Raises UserError, naming the run and the parameter, where the run starts otherwise than those before it.

        A parameter is shared where name, shape and the rule that draws it are the same.
        """
        first, order = self._orders.setdefault(seed, (name, initial["order"]))
        for key in order.keys() | initial["order"].keys():
            if order.get(key) != initial["order"].get(key):
                raise UserError(
                    f"run {name} has another order of data than {first}, of the same seed: {key} is "
                    f"{initial['order'].get(key)}, not {order.get(key)}"
                )
        shared = {}
        for parameter, start in initial["parameters"].items():
            key = (seed, parameter, tuple(start["shape"]), start["rule"])
            other, digest = self._values.get(key, (name, start["sha256"]))
            if digest != start["sha256"]:
                raise UserError(
                    f"run {name} starts parameter {parameter} from other values than {other}, of the same seed: they "
                    "are not to be compared"
                )
            shared[key] = name, digest
        self._values = shared | self._values
        self._seen.add(name)
        self._note(name, variant, initial["parameters"])

    def _note(self, name: str, variant: str, parameters: dict[str, Any]) -> None:
        others: Counter[str] = Counter()
        for parameter, start in parameters.items():
            key = (parameter, tuple(start["shape"]))
            rule, of = self._rules.setdefault(key, (start["rule"], variant))
            if rule != start["rule"]:
                others[of] += 1
        if others and variant not in self.declared:
            (of, count), *_ = others.most_common()
            self.declared[variant] = f"{variant} draws {count} of its parameters by rules of its own, not as {of} does"


def read_initial(run: Path) -> dict[str, Any] | None:
    """What a run started from; None where it has not said so yet. Raises UserError for a damaged file."""
    if not (run / FILE).is_file():
        return None
    found = read_json(run, FILE)
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("order", "parameters")):
        raise UserError(f"{run / FILE} is damaged: it has no order or no parameters")
    return found
