"""GPT-2 as one list of layer specs, built as a plain module or by DeepSpeed's ``PipelineModule`` alike."""

import re
from itertools import zip_longest
from typing import NamedTuple

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch import nn
from torch.nn.functional import dropout, embedding

from megaresid.attention.cache import ModelCache
from megaresid.model.init import STD, Normal, Rule, fill, owned_rules
from megaresid.model.layer import Layer
from megaresid.model.loss import full_logits, linear_cross_entropy
from megaresid.model.plan import ModelPlan
from megaresid.model.scores import target_scores
from megaresid.residual.stream import ResidualVariant, State

TOKENS = "tokens"  # the key under which the embedding matrix is tied to the output head


class TokenEmbedding(nn.Module):
    """The embedding matrix [padded vocabulary, C]: ids [B, T] int64 -> [B, T, C].

    Where the plan keeps documents apart it gives their numbers too, int32 [B, T], which rise by one at each
    <|endoftext|>, the first token of a document.
    """

    def __init__(self, plan: ModelPlan):
        super().__init__()
        shape = plan.shape
        self.vocab_size = shape.vocab_size
        self.end_of_text = shape.end_of_text if plan.documents else None
        self.weight = nn.Parameter(torch.empty(shape.padded_vocab_size, shape.width))

    def parameter_rules(self) -> dict[str, Rule]:
        return {"weight": Rule(Normal(STD, rows=self.vocab_size), decay=True)}

    def forward(self, idx: torch.Tensor, cache: ModelCache | None = None) -> torch.Tensor | tuple[torch.Tensor, ...]:
        x = embedding(idx, self.weight)
        if self.end_of_text is None:
            return x
        segment = (idx == self.end_of_text).cumsum(1, dtype=torch.int32)
        if cache is not None:
            segment = segment if cache.document is None else segment + cache.document[:, None]
            cache.document = segment[:, -1]
        return x, segment


class Open(nn.Module):
    """Adds the learned positions, if there are any, and opens the residual stream: [B, T, C] -> state.

    What comes with x is the side channel, which stays behind the state.
    """

    def __init__(self, plan: ModelPlan):
        super().__init__()
        self.dropout, self.opening = plan.shape.dropout, plan.residual_of(0).opening()
        self.positions = nn.Embedding(plan.shape.context, plan.shape.width) if plan.has_positions else None

    def forward(self, x: torch.Tensor | tuple[torch.Tensor, ...], cache: ModelCache | None = None) -> State:
        x, *side = (x,) if isinstance(x, torch.Tensor) else x
        start, length = 0 if cache is None else cache.position, x.shape[1]
        if self.positions is not None:
            x = x + self.positions(torch.arange(start, start + length, device=x.device))
        if cache is not None:
            cache.position += length
        return (*self.opening(dropout(x, self.dropout, self.training)), *side)


class Head(nn.Module):
    """The tied output projection: hidden [B, T, C] -> logits, or the loss or the targets' scores without ever holding
    the logits.

    It registers the embedding matrix as its own parameter, so that ZeRO-3 gathers it for this call too.
    """

    def __init__(self, tokens: TokenEmbedding):
        super().__init__()
        self.vocab_size, self.weight = tokens.vocab_size, tokens.weight

    def loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of the cross-entropies of ``targets`` [B, T] (negative ones count 0) over the number of positions."""
        return linear_cross_entropy(hidden, self.weight, targets, self.vocab_size)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None, scores: bool = False):
        if targets is None:
            return full_logits(hidden, self.weight, self.vocab_size), None
        if scores:
            return target_scores(hidden, self.weight, targets, self.vocab_size)
        return None, self.loss(hidden, targets)


class Part(NamedTuple):
    """One entry of the model: the canonical prefix of its parameters' names, and how to build it."""

    prefix: str
    spec: LayerSpec


def hidden_states(tokens: TokenEmbedding, hidden: torch.Tensor) -> torch.Tensor:
    """The tied end of a pipeline: hands on the hidden states; ``Head.loss`` is the pipeline's loss function."""
    return hidden


def layer_specs(plan: ModelPlan, activation_checkpointing: bool = False) -> list[Part]:
    """The model: token embedding, opening of the stream, one ``Layer`` a layer, its close, the tied head."""
    tied = {"tied_weight_attr": "weight"}
    last = plan.residual_of(plan.shape.layers - 1)
    closed = len(last.state_spec(2 * plan.shape.layers))
    return [
        Part("embed.tokens", TiedLayerSpec(TOKENS, TokenEmbedding, plan, **tied)),
        Part("embed", LayerSpec(Open, plan)),
        *(
            Part(f"layers.{index:02d}", LayerSpec(Layer, plan, index, activation_checkpointing))
            for index in range(plan.shape.layers)
        ),
        Part("head", LayerSpec(last.close_class, plan.shape, last.options, closed)),
        Part("embed.tokens", TiedLayerSpec(TOKENS, TokenEmbedding, plan, forward_fn=hidden_states, **tied)),
    ]


class GPT(nn.Module):
    """The plain module of a plan; ``forward(idx [B,T], targets=None)`` gives ``(logits, None)`` or ``(None, loss)``;
    with ``scores`` what ``target_scores`` gives of the targets.

    With a cache from ``init_cache``, idx goes on where the last call with it ended.

    Its parameters are not filled: use ``build``.
    """

    def __init__(self, plan: ModelPlan, activation_checkpointing: bool = False):
        super().__init__()
        self.plan, self.shape = plan, plan.shape
        parts = layer_specs(plan, activation_checkpointing)
        self.prefixes = [part.prefix for part in parts[:-1]]
        self.parts = nn.ModuleList(part.spec.build() for part in parts[:-1])
        self.head = Head(self.parts[0])
        self.shared = nn.ModuleDict()
        for variant in plan.variants():
            self._share(variant)

    def _share(self, variant: ResidualVariant) -> None:
        """Make what all sites of a variant use, and hand it to them."""
        if not (shared := variant.shared()):
            return
        self.shared.update(shared)
        for layer in range(self.shape.layers):
            if self.plan.residual_of(layer) is variant:
                for site in self.parts[2 + layer].sites.values():
                    site.use(shared)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        cache: ModelCache | None = None,
        scores: bool = False,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        caches = () if cache is None else (cache, cache, *cache.layers)
        x = idx
        for part, carried in zip_longest(self.parts, caches):
            x = part(x) if carried is None else part(x, carried)
        return self.head(x, targets, scores)

    def init_cache(self, length: int) -> ModelCache | None:
        """For a text of at most ``length`` tokens; None where a mixer cannot go on and the text must be run again."""
        mixers = (self.plan.mixer_class(layer) for layer in range(self.shape.layers))
        decodes = all(cls.decodes_of(options) for cls, options in mixers)
        return ModelCache(self.shape.layers, length) if decodes else None


def set_step(model: "GPT | PipelineModule", step: int) -> None:
    """Bring what depends on the step to the optimizer step that is numbered ``step`` from 1; 0 before the first. An
    evaluation after that step sees the same values."""
    for module in model.modules():
        if hasattr(module, "set_step"):
            module.set_step(step)


def canonical_name(path: str, prefixes: list[str]) -> str:
    """A parameter's canonical name from its path in ``GPT`` or in a ``PipelineModule``.

    Both number the same list of parts (``parts.2.…`` and ``2.…``) and a pipeline keeps the tied embedding apart, so
    ``layers.00.attention.site.norm.weight`` is one name for both. Decision: everything that is stored or compared
    uses these names, never a container's path.
    """
    if path.startswith(f"tied_modules.{TOKENS}."):
        return f"embed.tokens.{path.removeprefix(f'tied_modules.{TOKENS}.')}"
    if path.startswith("shared."):
        return path
    index, rest = re.fullmatch(r"(?:parts\.)?(\d+)\.(.+)", path).groups()
    rest = re.sub(r"^sites\.(\w+)\.", r"\1.site.", rest)
    return f"{prefixes[int(index)]}.{rest}"


def canonical_parameters(model: "GPT | PipelineModule", prefixes: list[str]) -> dict[str, nn.Parameter]:
    """The model's parameters (of this pipeline stage) by canonical name, in the model's order, ties once."""
    return {canonical_name(path, prefixes): parameter for path, parameter in model.named_parameters()}


def canonical_rules(model: "GPT | PipelineModule", prefixes: list[str], plan: ModelPlan) -> dict[str, Rule]:
    """The rules of all parameters by canonical name; ``fill`` refuses a parameter without one.

    GPT-2's rules of common modules, then what modules declare by ``parameter_rules`` for themselves and what is below
    them, then what a residual variant changes of its sublayers'.
    """
    rules, declared = {}, {}
    for path, module in model.named_modules():
        if path == "head":  # the tied matrix, whose rule is the embedding's
            continue
        for local, _ in module.named_parameters(recurse=False):
            name = canonical_name(f"{path}.{local}", prefixes)
            owned = owned_rules(module, plan.shape.layers, name.removesuffix(f".{local}"))
            if local in owned:
                rules[name] = owned[local]
        if hasattr(module, "parameter_rules"):
            own = module.parameter_rules()
            known = dict(module.named_parameters()).keys()
            if unknown := own.keys() - known:
                raise KeyError(f"{type(module).__name__} declares rules of parameters it has not: {sorted(unknown)}")
            declared |= {canonical_name(f"{path}.{local}", prefixes): rule for local, rule in own.items()}
    rules |= declared
    for name, rule in rules.items():
        if (found := re.fullmatch(r"layers\.(\d+)\.(.+)", name)) and ".site." not in name:
            layer = int(found[1])
            rules[name] = plan.residual_of(layer).sublayer_rule(layer, found[2], rule)
    return rules


def build(plan: ModelPlan, seed: int, activation_checkpointing: bool = False) -> GPT:
    """A plain model on the CPU in fp32 with every parameter filled."""
    model = GPT(plan, activation_checkpointing)
    fill(canonical_parameters(model, model.prefixes), canonical_rules(model, model.prefixes, plan), seed)
    return model
