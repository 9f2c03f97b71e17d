"""The DeepSpeed engine behind a small contract: train on a step's micro-batches, evaluate, name the parameters."""

import functools
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.torch_autocast import autocast_if_enabled

from megaresid.config import RunConfig
from megaresid.errors import UserError
from megaresid.evaluation.loaded import check_length
from megaresid.model.compile import compile_model
from megaresid.model.gpt import build, canonical_parameters, canonical_rules, set_step
from megaresid.model.plan import ModelPlan
from megaresid.training.ds_config import Batch, DeepSpeedConfig
from megaresid.training.machine import ranks_on_this_machine
from megaresid.training.optimizer import parameter_groups, set_learning_rate
from megaresid.training.rules import overridden


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: this rank's mean loss (a tensor), the norm of the global gradient before clipping, and
    whether the update was skipped because that is not finite."""

    loss: torch.Tensor
    gradient_norm: float
    skipped: bool


class Engine:
    """A model under ``deepspeed.initialize``; every method is called by every rank.

    ``parameters`` maps canonical names to the live parameters; ``set_step(step)`` serves what depends on the step. For
    evaluation, ``context`` is the most tokens of a sequence, ``vocab_size`` counts the ids that can be predicted, and
    ``positions_per_forward`` the positions of one forward, which training's memory is known to allow.
    """

    def __init__(self, plan: ModelPlan, config: RunConfig, ds_config: DeepSpeedConfig, batch: Batch):
        model = build(plan, config.run.seed, config.execution.activation_checkpointing)
        self.parameters = canonical_parameters(model, model.prefixes)
        rules = overridden(canonical_rules(model, model.prefixes, plan), config.optimizer.parameter_rules)
        groups = parameter_groups(self.parameters, rules, config.optimizer, ds_config.epsilon)
        self.device = torch.device(get_accelerator().current_device_name())
        module = model
        if config.execution.compile:
            # Where it can be one graph: an error rather than parts that silently run uncompiled.
            module = compile_model(model, fullgraph=plan.one_graph(self.device, ds_config.product_dtype))
        self.set_step = functools.partial(set_step, model)
        self.deepspeed, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=ds_config.engine)
        self.batch = batch
        self.stage = ds_config.stage
        self.context, self.vocab_size = plan.shape.context, plan.shape.vocab_size
        self.positions_per_forward = batch.micro * plan.shape.context
        # What is scored comes in many lengths, each of which torch.compile would compile for.
        self._uncompiled = model if config.execution.compile else None

    def train_step(
        self, micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]], learning_rate: float
    ) -> StepResult:
        """One optimizer step over ``batch.accumulation`` micro-batches (idx, targets), int64 [m, T] each."""
        set_learning_rate(self.deepspeed.optimizer.param_groups, learning_rate)
        micro_batches = iter(micro_batches)
        loss_sum = torch.zeros((), device=self.device)
        skipped_before = self.deepspeed.skipped_steps
        norm, skip = None, False
        for _ in range(self.batch.accumulation):
            idx, targets = (t.to(self.device, non_blocking=True) for t in next(micro_batches))
            _, loss = self.deepspeed(idx, targets)
            self.deepspeed.backward(loss)
            loss_sum += loss.detach().float()
            if self.stage == 0 and self.deepspeed.is_gradient_accumulation_boundary():
                norm, skip = self._guard_unsharded()
            self.deepspeed.step()
        if norm is None:
            norm = self.deepspeed.get_global_grad_norm()
            skip = self.deepspeed.skipped_steps > skipped_before
        return StepResult(loss_sum / self.batch.accumulation, float(norm), skip)

    def _guard_unsharded(self) -> tuple[torch.Tensor, bool]:
        """The norm at stage 0, where DeepSpeed keeps none; it would also apply gradients that are not finite, so
        those are dropped here (the optimizer passes over a parameter without one). Equal on all ranks: the
        gradients are averaged already."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if skip := not bool(torch.isfinite(norm)):
            self.deepspeed.zero_grad()
            self.deepspeed.skipped_steps += 1
        return norm, skip

    @torch.no_grad()
    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch in evaluation mode: a sum over valid targets divided by all positions."""
        with self._evaluating():
            _, loss = self.deepspeed(idx.to(self.device), targets.to(self.device))
        return loss.float()

    @torch.no_grad()
    def score(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probability of each wanted target and whether it is the likeliest token, in evaluation mode.

        Every rank calls it equally often; what it is given may differ between ranks, in shape too.

        Args:
            idx: int64 [m, T], T at most ``context``.
            targets: int64 [m, T], or [m, T, K] for K of each position; a negative one is not wanted.

        Returns:
            On this rank's device, in row-major order of the wanted targets: fp32 [n] and bool [n].

        Raises:
            ValueError: T is above ``context``.
        """
        check_length(idx, self.context)
        with self._evaluating():
            if self._uncompiled is None:
                return self.deepspeed(idx.to(self.device, non_blocking=True), targets, scores=True)
            with autocast_if_enabled(self.deepspeed):
                return self._uncompiled(idx.to(self.device, non_blocking=True), targets, scores=True)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode while the block runs."""
        training = self.deepspeed.module.training
        self.deepspeed.eval()
        try:
            yield
        finally:
            self.deepspeed.train(training)


def start_process_group() -> None:
    """Join the ranks that the launcher started (or be the only one), on the GPU with NCCL, else with gloo.

    On a CPU the machine's cores are shared out among its ranks, unless OMP_NUM_THREADS says otherwise.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls a collective by its old name, and every rank would say so.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    accelerator, local_rank = get_accelerator(), int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        torch.set_num_threads(_threads())
    elif local_rank >= accelerator.device_count():
        raise UserError(f"rank {local_rank} of this machine has no GPU: start at most {accelerator.device_count()}")
    else:
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(verbose=False)


def _threads() -> int:
    """This rank's share of the machine's cores, or what OMP_NUM_THREADS says (torchrun sets 1 unasked)."""
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is not None and not (chosen == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        return int(chosen)
    return max(1, len(os.sched_getaffinity(0)) // ranks_on_this_machine())
