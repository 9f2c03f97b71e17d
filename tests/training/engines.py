"""Tiny DeepSpeed engines that bring out what goes wrong with checkpoints, and DeepSpeed's own readers of state."""

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

ADAMW = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
SGD = {"type": "SGD", "params": {"lr": 1e-1, "momentum": 0.9}}


class Net(nn.Module):
    """Odd sizes, a tied matrix, a parameter of one element, one that is not trained, and dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.inner = nn.Linear(7, 5)
        self.outer = nn.Linear(5, 7)
        self.dropout = nn.Dropout(0.3)
        self.gate = nn.Parameter(torch.tensor([0.5]))
        self.shift = nn.Parameter(torch.randn(7), requires_grad=False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, idx):
        x = self.embed(idx)
        x = x + self.gate * self.outer(torch.tanh(self.inner(self.dropout(x + self.shift))))
        return nn.functional.cross_entropy(self.head(x).float().view(-1, 11), idx.roll(-1, 1).view(-1))


def make_engine(stage: int, optimizer=ADAMW, accumulation: int = 1, seed: int = 0, **config):
    """An engine and its parameters by name. Equal seeds make equal weights; dropout's generator differs by rank."""
    torch.manual_seed(seed)
    model = Net()
    parameters = dict(model.named_parameters())
    gate = [parameters["gate"]]
    others = [p for name, p in parameters.items() if name != "gate" and p.requires_grad]
    zero = {"stage": stage, **config.pop("zero_optimization", {})}
    if stage == 3:  # several sub-groups; some parameters kept gathered, some not
        zero |= {"sub_group_size": 30, "stage3_param_persistence_threshold": 10}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[{"params": others, "weight_decay": 0.1}, {"params": gate, "weight_decay": 0.0}],
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "optimizer": optimizer,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            **config,
        },
    )
    torch.manual_seed(1000 * (seed + 1) + dist.get_rank())
    return engine, parameters


def train(engine, steps: range) -> list[float]:
    """This rank's losses; batches and learning rate are functions of the step."""
    losses = []
    for step in steps:
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-2 * (1 + step)
        for micro in range(engine.gradient_accumulation_steps()):
            drawn = torch.Generator().manual_seed(100 * step + 10 * micro + dist.get_rank())
            loss = engine(torch.randint(11, (2, 6), generator=drawn))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def full_state(engine, parameters) -> dict[str, dict[str, torch.Tensor]]:
    """Whole tensors by kind and name, as DeepSpeed assembles them; ``weights`` are what the module computes with."""
    state = {"parameter": {}, "weights": {}}
    stage = engine.zero_optimization_stage()
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links states once, after the first group's first step, when later groups have none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    keys = {"SGD": ["momentum_buffer"]}.get(engine.optimizer_name().upper(), ["exp_avg", "exp_avg_sq"])
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            state["weights"][name] = parameter.detach().clone()
        if not parameter.requires_grad:
            state["parameter"][name] = state["weights"][name].float()
            continue
        state["parameter"][name] = (
            state["weights"][name] if stage == 0 else safe_get_full_fp32_param(parameter).detach().clone()
        )
        for key in keys:
            full = (
                engine.optimizer.state[parameter][key]
                if stage == 0
                else safe_get_full_optimizer_state(parameter, key)
            )
            state.setdefault(key, {})[name] = full.detach().clone()
    return state


def adam_steps(engine) -> set[float]:
    """The step counts of all that this rank's AdamW updates."""
    base = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    return {float(state["step"]) for state in base.state.values()}


def equal(one, other) -> bool:
    """Bitwise, in nested dictionaries of tensors."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one.dtype == other.dtype and torch.equal(one, other)
