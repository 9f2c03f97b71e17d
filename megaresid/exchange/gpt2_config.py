"""A GPT-2's ``config.json`` in Hugging Face's form, both ways, and which models of ours are a GPT-2."""

from typing import Any

from megaresid.errors import UserError
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import GPT2_END_OF_TEXT, GPT2_VOCABULARY, ModelShape

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
TANH_FORMS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one formula
THEIR_ACTIVATIONS = {"gelu": "gelu", **dict.fromkeys(TANH_FORMS, "gelu_tanh")}
SIZES = {"n_layer": "layers", "n_head": "heads", "n_embd": "width", "n_positions": "context"}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
LACKING = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
"""Options of ``GPT2Config`` that change the model, with the one value that ours has: GPT-2's."""


def check_is_gpt2(plan: ModelPlan) -> None:
    """Raise UserError naming what of a model a GPT-2 cannot hold."""
    tree, gpt2 = plan.tree(), ModelPlan(plan.shape, positions="learned").tree()
    for layer, (found, wanted) in enumerate(zip(tree["layers"], gpt2["layers"])):
        for kind in ("residual", "attention"):
            if found[kind]["name"] != wanted[kind]["name"]:
                _refuse(f"{kind} {found[kind]['name']!r} of layer {layer} is not GPT-2's, {wanted[kind]['name']!r}")
            for option, value in found[kind].items():
                if value != wanted[kind][option]:
                    what = f"{kind} {found[kind]['name']!r} of layer {layer}"
                    _refuse(f"{what} has {option}={value}, and GPT-2's is {option}={wanted[kind][option]}")
    if not plan.has_positions:
        _refuse("it has no learned positions, as GPT-2 has")
    if plan.documents:
        _refuse("it keeps documents apart (--separate-documents), which GPT-2 does not")
    if (plan.shape.vocab_size, plan.shape.end_of_text) != (GPT2_VOCABULARY, GPT2_END_OF_TEXT):
        _refuse(f"its vocabulary has {plan.shape.vocab_size} ids, and GPT-2's tokenizer {GPT2_VOCABULARY}")


def _refuse(why: str) -> None:
    raise UserError(f"--format hf: {why}: export it by --format safetensors, which holds every model")


def config_of(shape: ModelShape) -> dict[str, Any]:
    """What ``AutoModelForCausalLM.from_pretrained`` reads."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": shape.vocab_size,
        "n_positions": shape.context,
        "n_ctx": shape.context,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
        "n_inner": None,
        "activation_function": ACTIVATIONS[shape.activation],
        **dict.fromkeys(DROPOUTS, shape.dropout),
        "layer_norm_epsilon": shape.norm_epsilon,
        "initializer_range": 0.02,
        **LACKING,
        "bos_token_id": shape.end_of_text,
        "eos_token_id": shape.end_of_text,
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "float32",
    }


def shape_of(config: dict[str, Any], source: str) -> ModelShape:
    """The shape of a GPT-2 from its ``config.json``; raises UserError naming an option that we lack.

    Dropout is taken over where its three kinds are equal, and is 0 elsewhere: it is of training alone.
    """

    def refuse(key: str, wanted: str) -> None:
        raise UserError(f"{source}: {key}={config.get(key)!r}: what is read is a GPT-2, with {wanted}")

    if config.get("model_type") != "gpt2":
        refuse("model_type", "'gpt2'")
    for key, value in LACKING.items():
        if config.get(key, value) is not value:
            refuse(key, repr(value))
    for key in (*SIZES, "vocab_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            refuse(key, "a whole number above 0")
    if config["vocab_size"] != GPT2_VOCABULARY:
        refuse("vocab_size", f"its vocabulary of {GPT2_VOCABULARY}")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        refuse("n_inner", "null or 4 n_embd")
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in THEIR_ACTIVATIONS:
        refuse("activation_function", " or ".join(THEIR_ACTIVATIONS))
    if config["n_embd"] % config["n_head"]:
        refuse("n_head", "a divisor of n_embd")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    dropouts = [config.get(key, 0.1) for key in DROPOUTS]
    for key, values in (("layer_norm_epsilon", [epsilon]), ("resid_pdrop", dropouts)):
        if not all(isinstance(value, int | float) and 0 <= value < 1 for value in values):
            refuse(key, "numbers from 0 to 1")
    return ModelShape(
        **{ours: config[theirs] for theirs, ours in SIZES.items()},
        dropout=dropouts[0] if len(set(dropouts)) == 1 else 0.0,
        activation=THEIR_ACTIVATIONS[activation],
        norm_epsilon=epsilon,
    )
