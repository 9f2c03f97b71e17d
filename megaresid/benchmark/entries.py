"""What the benchmarks go through: residual variants with softmax attention, and mixers with vanilla residuals."""

from megaresid.attention.mixer import MIXERS
from megaresid.errors import UserError
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape
from megaresid.residual.stream import RESIDUALS

ATTENTION = "attention="
WITH_OPTIONS = (
    "attention_residuals(scale=sum)",
    "block_attention_residuals(block_size=2)",
    "deep_delta(target=linear)",
    "dense_former(dilation=2, period=2)",
    "frac_connections(dynamic=false)",
    "hyper_connections(dynamic=false)",
    "hyper_connections(streams=2)",
    "laurel_rw(scale=1)",
    "mhc(streams=2)",
    "pro_res(warmup=20)",
    "rezero(norm=false)",
    "token_gate(form=sigmoid)",
    "attention=value_residual(learned=true)",
)
"""Beside every variant and mixer with its defaults: options that change what is computed."""


def specs_of(entry: str) -> dict[str, str]:
    """The layer specs of an entry: a residual pattern with softmax attention, or ``attention=`` and a pattern of
    mixers with the vanilla residual."""
    if entry.startswith(ATTENTION):
        return {"attention": entry.removeprefix(ATTENTION), "residual": "vanilla"}
    return {"attention": "softmax", "residual": entry}


def plan_of(entry: str, shape: ModelShape) -> ModelPlan:
    """The model of an entry. Raises UserError."""
    return ModelPlan(shape, **specs_of(entry))


def mixers() -> list[str]:
    """Those that stand for one without more being said, and need nothing but a CPU; softmax is the first."""
    complete = [
        name
        for name, cls in MIXERS.classes().items()
        if not cls.needs and not any(field.is_required() for field in cls.Options.model_fields.values())
    ]
    return sorted([*complete, *MIXERS.presets()], key=lambda name: name != "softmax")


def entries(variants: str | None, shape: ModelShape) -> list[str]:
    """The entries of ``--variants``, separated by semicolons; by default all that there are. Each can be built with
    the shape and is another model than the others (raises UserError)."""
    if variants is None:
        _, *others = mixers()  # softmax's is vanilla's model
        chosen = [*RESIDUALS.classes(), *WITH_OPTIONS, *(ATTENTION + name for name in others)]
    else:
        chosen = [entry.strip() for entry in variants.split(";") if entry.strip()]
    if not chosen:
        raise UserError(f"--variants {variants!r} names none: separate them by semicolons")
    seen: dict[str, str] = {}
    for entry in chosen:
        model = plan_of(entry, shape).hash
        if model in seen:
            also = "" if seen[model] == entry else f", also as {seen[model]}"
            raise UserError(f"--variants: {entry} is named twice{also}: leave one out")
        seen[model] = entry
    return chosen
