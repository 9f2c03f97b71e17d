"""With the same random weights the model is Hugging Face's GPT-2."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from megaresid.model.count import parameters_by_component
from megaresid.model.gpt import build, canonical_parameters
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import PRESETS, ModelShape

SHAPE = ModelShape(layers=3, heads=4, width=64, context=48, vocab_size=211)


def in_hugging_faces_layout(tensors: dict[str, torch.Tensor], shape: ModelShape) -> dict[str, torch.Tensor]:
    """Weights, or their gradients, under its names: Conv1D stores [in, out], and q, k, v lie side by side."""
    state = {
        "transformer.wte.weight": tensors["embed.tokens.weight"][: shape.vocab_size],
        "transformer.wpe.weight": tensors["embed.positions.weight"],
        "transformer.ln_f.weight": tensors["head.norm.weight"],
        "transformer.ln_f.bias": tensors["head.norm.bias"],
    }
    for layer in range(shape.layers):
        ours, theirs = f"layers.{layer:02d}", f"transformer.h.{layer}"
        for kind, norm in (("attention", "ln_1"), ("mlp", "ln_2")):
            for what in ("weight", "bias"):
                state[f"{theirs}.{norm}.{what}"] = tensors[f"{ours}.{kind}.site.norm.{what}"]
        qkv = [f"{ours}.attention.{x}_proj" for x in "qkv"]
        state[f"{theirs}.attn.c_attn.weight"] = torch.cat([tensors[f"{x}.weight"].T for x in qkv], dim=1)
        state[f"{theirs}.attn.c_attn.bias"] = torch.cat([tensors[f"{x}.bias"] for x in qkv])
        for one, other in (
            ("attention.o_proj", "attn.c_proj"),
            ("mlp.fc", "mlp.c_fc"),
            ("mlp.proj", "mlp.c_proj"),
        ):
            state[f"{theirs}.{other}.weight"] = tensors[f"{ours}.{one}.weight"].T
            state[f"{theirs}.{other}.bias"] = tensors[f"{ours}.{one}.bias"]
    return state


def hugging_face_twin(parameters: dict[str, torch.Tensor], shape: ModelShape) -> GPT2LMHeadModel:
    """GPT2LMHeadModel with our weights."""
    activation = {"gelu_tanh": "gelu_new", "gelu": "gelu"}[shape.activation]
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.context,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function=activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    twin = GPT2LMHeadModel(config).double()
    missing, unexpected = twin.load_state_dict(in_hugging_faces_layout(parameters, shape), strict=False)
    assert not unexpected and missing == ["lm_head.weight"]
    return twin.eval()


def randomised(shape: ModelShape) -> torch.nn.Module:
    """A model in fp64 whose every parameter is away from its initial value; padding rows stay zero."""
    model = build(ModelPlan(shape), seed=1).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in canonical_parameters(model, model.prefixes).items():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
            if name == "embed.tokens.weight":
                noise[shape.vocab_size :] = 0
            parameter.add_(noise)
    return model


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_logits_loss_and_gradients_equal_hugging_face(activation):
    shape = SHAPE.model_copy(update={"activation": activation})
    model = randomised(shape)
    parameters = canonical_parameters(model, model.prefixes)
    twin = hugging_face_twin({name: p.detach() for name, p in parameters.items()}, shape)
    idx = torch.randint(shape.vocab_size, (2, shape.context), generator=torch.Generator().manual_seed(3))
    targets = idx.roll(-1, dims=1)

    expected = twin(idx).logits
    logits, _ = model(idx)
    assert logits.shape == (2, shape.context, shape.vocab_size)
    assert (logits - expected).abs().max() < 1e-10

    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten())
    _, loss = model(idx, targets)
    assert abs(loss - expected_loss) < 1e-10
    loss.backward()
    expected_loss.backward()
    gradients = {name: p.grad for name, p in parameters.items()}
    assert gradients["embed.tokens.weight"][shape.vocab_size :].abs().max() == 0
    theirs = dict(twin.named_parameters())
    ours = in_hugging_faces_layout(gradients, shape)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name].grad).abs().max() < 1e-10, name

    logits, expected = model.float()(idx)[0], twin.float()(idx).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_wrong_gelu_would_be_seen():
    model = randomised(SHAPE)
    parameters = {name: p.detach() for name, p in canonical_parameters(model, model.prefixes).items()}
    twin = hugging_face_twin(parameters, SHAPE.model_copy(update={"activation": "gelu"}))
    idx = torch.arange(SHAPE.context)[None]
    assert (model(idx)[0] - twin(idx).logits).abs().max() > 1e-6


@pytest.mark.parametrize(
    "preset, published", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)]
)
def test_presets_have_the_published_parameter_counts(preset, published):
    assert sum(parameters_by_component(ModelPlan(PRESETS[preset])).values()) == published
