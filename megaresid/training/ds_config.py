"""The user's DeepSpeed JSON: read, checked against our options, and resolved.

It is the truth for ZeRO, offload, communication, precision and monitors. Batch fields, clipping, learning rate,
weight decay and betas may be ``"auto"`` or absent and then come from our options; a value there that contradicts an
option is an error, since one of the two would be ignored silently.
"""

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from deepspeed.runtime.config import DeepSpeedConfig as EngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger
from pydantic import ValidationError

from megaresid.config import ExecutionOptions, RunConfig, read_object
from megaresid.errors import UserError, suggestion

MONITORS = ("tensorboard", "wandb", "csv_monitor", "comet")
PASSED_ON = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "bf16",
    "torch_autocast",
    "data_types",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "aio",
    "comms_logger",
    "flops_profiler",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
)
REFUSED = {
    "scheduler": "the learning rate is a function of the step: use --schedule",
    "fp16": "use torch_autocast with bfloat16, which needs no loss scale",
    "amp": "use torch_autocast with bfloat16",
    "activation_checkpointing": "use --activation-checkpointing",
    "checkpoint": "checkpoints are this project's own: use --checkpoint-interval",
}
SECTIONS = ("optimizer", "zero_optimization", "bf16", "torch_autocast", "data_types", *MONITORS)
SECTIONS += ("aio", "comms_logger", "flops_profiler")
AUTOCAST = ("enabled", "dtype", "lower_precision_safe_modules")
DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")
TORCH_OPTIMIZERS = ("Adam", "AdamW", "Adagrad")  # DeepSpeed's of these names take what torch's take, and these:
FUSED_ADAM = ("torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states", "set_grad_none")
ADAM_EPSILON = 1e-8  # torch's and DeepSpeed's default
BFLOAT16 = ("bfloat16", "bf16", "torch.bfloat16")
NEVER = 1 << 40  # DeepSpeed prints its own step line every this many steps


@dataclass(frozen=True)
class Batch:
    """How a global batch is split: ``micro`` sequences x ``accumulation`` forwards x data-parallel ``ranks``."""

    micro: int
    accumulation: int
    ranks: int

    @property
    def sequences(self) -> int:
        return self.micro * self.accumulation * self.ranks

    def describe(self, context: int) -> str:
        """One line that shows the product, for a context of so many tokens."""
        return (
            f"{self.micro} sequences x {self.accumulation} accumulation x {self.ranks} ranks = {self.sequences} "
            f"sequences, {self.sequences * context:,} tokens per step"
        )


def data_parallel_ranks(config: RunConfig, ranks: int) -> int:
    """How many of the ranks have data of their own; raises UserError where the stages do not divide them."""
    stages = config.execution.pipeline_stages
    if ranks % stages:
        raise UserError(f"--pipeline-stages {stages} does not divide the {ranks} ranks: start a multiple of {stages}")
    return ranks // stages


def plan_batch(config: RunConfig, ranks: int) -> Batch:
    """Split the global batch over ``ranks``; raises UserError with the numbers where it does not divide."""
    total, micro = config.batch.global_batch_size, config.batch.micro_batch_size
    if total % ranks:
        raise UserError(f"--global-batch-size {total} is not divisible by the {ranks} ranks: choose a multiple of them")
    share = total // ranks
    if micro is None:
        micro = next(size for size in range(min(16, share), 0, -1) if share % size == 0)
    if share % micro:
        raise UserError(
            f"--global-batch-size {total} is not divisible by micro-batch {micro} x {ranks} ranks: "
            f"choose a micro-batch that divides {share}"
        )
    return Batch(micro, share // micro, ranks)


@dataclass(frozen=True)
class DeepSpeedConfig:
    """``engine`` goes to ``deepspeed.initialize``; ``monitors`` are the user's, fed by our own events."""

    engine: dict[str, Any]
    monitors: dict[str, Any]

    @property
    def stage(self) -> int:
        return self.engine["zero_optimization"]["stage"]

    @property
    def epsilon(self) -> float | None:
        """The Adam family's epsilon; None for another optimizer."""
        optimizer = self.engine["optimizer"]
        return optimizer["params"].get("eps", ADAM_EPSILON) if "adam" in optimizer["type"].lower() else None

    @property
    def autocast_dtype(self) -> str | None:
        """The dtype that matrix products run in where it is not fp32, e.g. ``bfloat16``."""
        sections = (self.engine.get(name, {}) for name in ("torch_autocast", "bf16"))
        return "bfloat16" if any(section.get("enabled") for section in sections) else None

    @property
    def product_dtype(self) -> torch.dtype:
        """The dtype that matrix products run in."""
        return getattr(torch, self.autocast_dtype or "float32")


def resolve(path: Path, config: RunConfig, batch: Batch) -> DeepSpeedConfig:
    """Read ``path`` and fill what is "auto" or absent. Raises UserError naming the file, the key and the mend."""
    tree = read_object(path, "--deepspeed-config")
    for key in tree:
        if key in REFUSED:
            raise UserError(f"{path}: {key} is not supported here: {REFUSED[key]}")
        if key not in PASSED_ON + MONITORS:
            raise UserError(f"{path}: unknown key {key!r}: {suggestion(key, PASSED_ON + MONITORS)}")
        if key in SECTIONS and not isinstance(tree[key], dict):
            raise UserError(f"{path}: {key} is {tree[key]!r}: expected an object of keys and values")
    monitors = {key: tree.pop(key) for key in MONITORS if key in tree}

    def settle(section: dict, key: str, value: Any, option: str) -> None:
        given = section.get(key, "auto")
        if given != "auto" and given != value:
            raise UserError(f'{path}: {key} is {given} but {option} is {value}: set it to "auto", or make them agree')
        section[key] = value

    settle(tree, "train_batch_size", batch.sequences, "--global-batch-size")
    settle(tree, "train_micro_batch_size_per_gpu", batch.micro, "the micro-batch")
    settle(tree, "gradient_accumulation_steps", batch.accumulation, "the accumulation")
    settle(tree, "gradient_clipping", config.optimizer.clip, "--clip")
    _settle_optimizer(path, tree, config, settle)
    zero = tree.setdefault("zero_optimization", {})
    if type(zero.setdefault("stage", 0)) is not int or zero["stage"] not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage is {zero['stage']}: it is 0, 1, 2 or 3")
    _check_sections(path, tree, monitors)
    if tree.get("bf16", {}).get("enabled") and zero["stage"] == 0:
        raise UserError(f"{path}: bf16.enabled with ZeRO 0 has no fp32 weights: use torch_autocast, or stage 1 to 3")
    if config.execution.compile and zero["stage"] == 3:
        raise UserError(f"{path}: --compile does not work with ZeRO-3: leave it out, or use stage 0 to 2")
    if config.execution.pipeline_stages > 1:
        _check_pipeline(path, tree, config.execution)
    tree.setdefault("steps_per_print", NEVER)
    _check_whole(path, tree, monitors)
    return DeepSpeedConfig(tree, monitors)


def _check_pipeline(path: Path, tree: dict, execution: ExecutionOptions) -> None:
    """Refuse what the stages of a pipeline cannot do."""
    option, zero = f"--pipeline-stages {execution.pipeline_stages}", tree["zero_optimization"]
    if zero["stage"] > 1:
        raise UserError(f"{path}: zero_optimization.stage is {zero['stage']}: {option} takes ZeRO 0 or 1")
    if execution.compile:
        raise UserError(f"--compile does not work with {option}: leave one of them out")
    if tree.get("bf16", {}).get("enabled"):
        raise UserError(f"{path}: bf16.enabled does not work with {option}: use torch_autocast with bfloat16")
    for key, mend in (
        ("overlap_comm", "gradients are reduced once a step"),
        ("offload_optimizer", "keep the optimizer on the GPU"),
        ("offload_param", "keep the parameters on the GPU"),
    ):
        if zero.get(key):
            raise UserError(f"{path}: zero_optimization.{key} does not work with {option}: leave it out, {mend}")


def _settle_optimizer(path: Path, tree: dict, config: RunConfig, settle) -> None:
    optimizer = tree.get("optimizer", {})
    if not isinstance(optimizer.get("type"), str):
        raise UserError(f'{path}: no optimizer is named: add "optimizer": {{"type": "AdamW", "params": {{}}}}')
    _only(path, "optimizer", optimizer, ("type", "params", "legacy_fusion"))
    known = {*DEEPSPEED_OPTIMIZERS, *(name for name in dir(torch.optim) if name[0].isupper())}
    if optimizer["type"].lower() == "muon":
        # It wants every matrix marked, and moves its momentum before the norm is known that a bad step is refused by.
        raise UserError(f"{path}: optimizer.type {optimizer['type']!r}: Muon is not supported: choose AdamW, say")
    if optimizer["type"] not in known and optimizer["type"].lower() not in DEEPSPEED_OPTIMIZERS:
        raise UserError(f"{path}: optimizer.type {optimizer['type']!r}: {suggestion(optimizer['type'], known)}")
    params = optimizer.setdefault("params", {})
    if not isinstance(params, dict):
        raise UserError(f"{path}: optimizer.params is {params!r}: expected an object of keys and values")
    settle(params, "lr", config.optimizer.learning_rate, "--learning-rate")
    settle(params, "weight_decay", config.optimizer.weight_decay, "--weight-decay")
    if "betas" in params or "adam" in optimizer["type"].lower():
        params["betas"] = list(params["betas"]) if isinstance(params.get("betas"), list) else "auto"
        settle(params, "betas", list(config.optimizer.betas), "--betas")


def _check_sections(path: Path, tree: dict, monitors: dict) -> None:
    """Hold the sections against DeepSpeed's own models and the optimizer's own arguments, which would otherwise
    complain only once the ranks have started."""
    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}
    models |= {name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()}
    for section, content in (tree | monitors).items():
        if section not in models:
            continue
        model = models[section]
        try:
            model(**content)
        except ValidationError as error:
            problem = error.errors()[0]
            if not problem["loc"]:  # a check over several keys
                raise UserError(f"{path}: {section}: {problem['msg']}") from None
            key, known = str(problem["loc"][0]), model.model_fields
            what = problem["msg"] if key in known else f"unknown key: {suggestion(key, known)}"
            raise UserError(f"{path}: {section}.{key}: {what}") from None
        except Exception as error:  # its models' own code, on values that it does not expect
            raise UserError(f"{path}: {section}: {type(error).__name__}: {error}") from None
    _only(path, "data_types", tree.get("data_types", {}), DATA_TYPES)
    autocast = tree.get("torch_autocast", {})
    _only(path, "torch_autocast", autocast, AUTOCAST)
    if autocast.get("enabled"):
        if autocast.setdefault("dtype", "bfloat16") not in BFLOAT16:
            raise UserError(f"{path}: torch_autocast.dtype is {autocast['dtype']!r}: only bfloat16 needs no loss scale")
        autocast["dtype"] = "bfloat16"
    kind, params = tree["optimizer"]["type"], tree["optimizer"]["params"]
    if kind in TORCH_OPTIMIZERS or kind.lower() not in DEEPSPEED_OPTIMIZERS:
        known = {*inspect.signature(getattr(torch.optim, kind)).parameters, *FUSED_ADAM} - {"params"}
        _only(path, "optimizer.params", params, known)
    if hasattr(torch.optim, kind):
        try:
            own = {key: value for key, value in params.items() if key not in FUSED_ADAM}
            getattr(torch.optim, kind)([torch.nn.Parameter(torch.zeros(1))], **own)
        except Exception as error:  # of an optimizer's own checks, or of its arithmetic on values of a wrong type
            raise UserError(f"{path}: optimizer.params: {type(error).__name__}: {error}") from None


def _check_whole(path: Path, tree: dict, monitors: dict) -> None:
    """Have DeepSpeed read the whole, whose checks it would otherwise make once the ranks have started."""
    # Of a group that is not there yet it takes one rank.
    alone = {key: value for key, value in (tree | monitors).items() if key != "train_batch_size"}
    enabled, logger.disabled = logger.disabled, True
    try:
        EngineConfig(copy.deepcopy(alone))
    except Exception as error:  # it has asserts, pydantic's errors, and none of its own
        what = " ".join(str(error).split())
        raise UserError(f"{path}: DeepSpeed does not take it: {type(error).__name__}: {what}") from None
    finally:
        logger.disabled = enabled


def _only(path: Path, section: str, content: dict, known: Iterable[str]) -> None:
    for key in content:
        if key not in known:
            raise UserError(f"{path}: {section}.{key}: unknown key: {suggestion(key, known)}")
