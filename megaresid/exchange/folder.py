"""The self-describing folder: a model of any variant, for any machine, without a run directory.

    megaresid.json                          what the model is (``Description``), and the other files' size and SHA-256
    model.safetensors                       its parameters, fp32, by canonical name; or several files with an index

``megaresid.load(folder)`` makes a model of it. Without megaresid: ``spec`` is the whole model with every option
written out, ``parameters`` its tensors with their shapes, named ``embed.tokens.weight`` (rows from
``spec.shape.vocab_size`` on are zeros that pad the matrix; the output head is the same matrix),
``embed.positions.weight``, ``layers.07.attention.…``, ``layers.07.mlp.…``, ``….site.…`` (a sublayer's norm and its
residual connection) and ``head.…`` (the final norm). Weights of linear maps are [outputs, inputs], as in
``torch.nn.Linear``.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from megaresid import __version__
from megaresid.durable import write_text
from megaresid.errors import UserError
from megaresid.exchange.restore import check_fit, filled
from megaresid.exchange.weights import Weights
from megaresid.json_text import parse_json
from megaresid.model.gpt import GPT
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.users_code import mistakes_told, none_from

DESCRIPTION = "megaresid.json"
FORMAT = "megaresid model"


class FileRecord(BaseModel):
    """A file's size in bytes and SHA-256, hexadecimal."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int
    sha256: str


class Description(BaseModel):
    """``megaresid.json``.

    ``attention`` and ``residual`` are the layer specs as they were written, ``spec`` what they resolve to (its hash is
    ``spec_sha256``). ``step`` is the optimizer step, ``source`` names the run or model it was made of, ``data`` is the
    identity of the data set, ``products`` the dtype of matrix products in training, ``modules`` the user's own classes
    that the layer specs name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["megaresid model"] = FORMAT
    schema_version: Literal[1] = 1
    megaresid: str = __version__
    source: str
    step: int
    data: str | None
    dtype: Literal["float32"] = "float32"
    products: Literal["float32", "bfloat16"]
    attention: str
    residual: str
    modules: list[str]
    spec: dict[str, Any]
    spec_sha256: str
    parameters: dict[str, list[int]]
    files: dict[str, FileRecord]

    def plan(self, folder: Path) -> ModelPlan:
        """Raises UserError where this version, or the user's modules, make another model of the layer specs."""
        try:
            shape, positions = ModelShape.model_validate(self.spec["shape"]), self.spec["positions"]
            with none_from(folder), mistakes_told():
                plan = ModelPlan(
                    shape,
                    self.attention,
                    self.residual,
                    "learned" if positions else "none",
                    documents=self.spec["documents"],
                )
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        except (KeyError, ValidationError):
            raise UserError(
                f"{folder / DESCRIPTION}: its spec is not of this version of megaresid: use {self.megaresid}, which "
                "wrote it"
            ) from None
        if plan.hash != self.spec_sha256:
            others = f" and its own {', '.join(self.modules)}" if self.modules else ""
            raise UserError(
                f"{folder}: this version of megaresid makes another model of its layer specs: use megaresid "
                f"{self.megaresid}{others}, which wrote it"
            )
        return plan


@dataclass(frozen=True)
class ExportedModel:
    """A ``Saved`` (see ``saved_run``) that is a self-describing folder."""

    description: Description
    plan: ModelPlan
    folder: Path
    config: None = None

    @property
    def step(self) -> int:
        return self.description.step

    @property
    def source(self) -> str:
        return self.description.source

    @property
    def data(self) -> str | None:
        return self.description.data

    @property
    def dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.description.products == "bfloat16" else None

    @property
    def weights(self) -> Path:
        return self.folder

    def parameters(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        check_files(self.folder, self.description)
        with Weights(self.folder) as weights:
            for name in self.description.parameters if names is None else names:
                yield name, weights.read(name)

    def model(self) -> GPT:
        return filled(self.plan, self.step, self.parameters())


def describe(
    plan: ModelPlan,
    *,
    source: str,
    step: int,
    data: str | None,
    dtype: torch.dtype | None,
    parameters: dict[str, list[int]],
    files: Sequence[Path],
) -> Description:
    """The description of a model whose weights are in ``files``."""
    tree = plan.tree()
    names = {part["name"] for layer in tree["layers"] for part in layer.values()}
    return Description(
        source=source,
        step=step,
        data=data,
        products="bfloat16" if dtype == torch.bfloat16 else "float32",
        attention=plan.attention,
        residual=plan.residual,
        modules=sorted(name for name in names if ":" in name),
        spec=tree,
        spec_sha256=plan.hash,
        parameters=parameters,
        files={path.name: _record(path) for path in files},
    )


def write_description(folder: Path, description: Description) -> None:
    """Written last: a folder without it is no model."""
    write_text(folder / DESCRIPTION, json.dumps(description.model_dump(mode="json"), indent=1) + "\n")


def is_folder(path: Path) -> bool:
    """Whether an exported model is there, whatever its state."""
    return (path / DESCRIPTION).is_file()


def open_folder(path: Path) -> ExportedModel | None:
    """The model of an exported folder, None where ``path`` is none. Its parameters are not read yet.

    Raises UserError for a description or weights that are damaged or of another version, a user's module that cannot
    be imported, and parameters that are not the model's.
    """
    if not is_folder(path):
        return None
    description = read_description(path)
    plan = description.plan(path)
    with Weights(path) as weights:
        if weights.shapes != description.parameters:
            raise UserError(f"{path}: its weights are not those that {DESCRIPTION} lists: get a good copy")
    check_fit(plan, description.parameters, str(path))
    return ExportedModel(description, plan, path)


def check_files(folder: Path, description: Description) -> None:
    """Raise UserError naming the first file whose size or hash is not that of the description."""
    for name, record in description.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: the file is missing, {DESCRIPTION} lists it: get a good copy")
        if path.stat().st_size != record.bytes or _record(path) != record:
            raise UserError(f"{path}: its bytes are not those that {DESCRIPTION} lists, it is damaged: get a good copy")


def read_description(folder: Path) -> Description:
    """Raises UserError for one that is damaged or of another version."""
    path = folder / DESCRIPTION
    try:
        tree = parse_json(path.read_bytes())
        if isinstance(tree, dict) and tree.get("schema_version") != 1:
            raise UserError(
                f"{path}: schema_version {tree.get('schema_version')}, and this version of megaresid reads 1: use the "
                f"version that wrote it ({tree.get('megaresid')})"
            )
        description = Description.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}: get a good copy") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if strange := [name for name in description.files if Path(name).name != name]:
        raise UserError(f"{path}: {strange[0]!r} is not the name of a file beside it")
    return description


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())
