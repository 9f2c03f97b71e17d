"""The DeepSpeed engine behind a small contract: train on a step's micro-batches, evaluate, name the parameters."""

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
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
from megaresid.training.health import finite
from megaresid.training.initial import parameter_starts
from megaresid.training.machine import ranks_on_this_machine
from megaresid.training.optimizer import parameter_groups, set_learning_rate
from megaresid.training.rules import overridden
from megaresid.training.shared_memory import unlink_own_buffer
from megaresid.training.update_gate import UpdateGate


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step: this rank's mean loss (a tensor), the norm of the global gradient before clipping, whether
    the update was skipped, and the mean loss of the global batch; all but the first are equal on all ranks."""

    loss: torch.Tensor
    gradient_norm: float
    skipped: bool
    mean_loss: float


class Engine:
    """A model under ``deepspeed.initialize``; every method is called by every rank.

    ``parameters`` maps canonical names to the live parameters; ``starts`` is how they started, on rank 0 alone (in a
    pipeline, on each rank those of its stage). ``set_step(step)`` serves what depends on the step. For evaluation,
    ``context`` is the most tokens of a sequence, ``vocab_size`` counts the ids that can be predicted, and
    ``positions_per_forward`` the positions of one forward, which training's memory is known to allow.
    """

    def __init__(self, plan: ModelPlan, config: RunConfig, ds_config: DeepSpeedConfig, batch: Batch):
        model = build(plan, config.run.seed, config.execution.activation_checkpointing)
        self.parameters = canonical_parameters(model, model.prefixes)
        rules = overridden(canonical_rules(model, model.prefixes, plan), config.optimizer.parameter_rules)
        groups = parameter_groups(self.parameters, rules, config.optimizer, ds_config.epsilon)
        self.starts = parameter_starts(self.parameters, rules) if torch.distributed.get_rank() == 0 else {}
        self.device = torch.device(get_accelerator().current_device_name())
        self.model = module = model
        if config.execution.compile:
            # Where it can be one graph: an error rather than parts that silently run uncompiled.
            module = compile_model(model, fullgraph=plan.one_graph(self.device, ds_config.product_dtype))
        self.set_step = functools.partial(set_step, model)
        self.deepspeed, *_ = deepspeed.initialize(model=module, model_parameters=groups, config=ds_config.engine)
        self._gate = UpdateGate(self.deepspeed, self._gradients)
        self.micro_losses: list[torch.Tensor] = []
        self.batch = batch
        self.data_rank = torch.distributed.get_rank()
        self.stage = ds_config.stage
        self.context, self.vocab_size = plan.shape.context, plan.shape.vocab_size
        self.positions_per_forward = batch.micro * plan.shape.context
        # What is scored comes in many lengths, each of which torch.compile would compile for.
        self._uncompiled = model if config.execution.compile else None

    def train_step(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        learning_rate: float,
        accepts: Callable[[float, float], bool] = finite,
    ) -> StepResult:
        """One optimizer step over ``batch.accumulation`` micro-batches (idx, targets), int64 [m, T] each.

        ``accepts(loss, norm)`` says whether the update is made, from the global batch's mean loss and the norm of its
        gradient before clipping, the same numbers on all ranks; it is called once, while the gradients are there.
        Where it says no, parameters, optimizer state and its step counts stay as they are. A norm that is not finite
        comes as infinity, and has to be refused.
        """
        set_learning_rate(self.deepspeed.optimizer.param_groups, learning_rate)
        micro_batches = iter(micro_batches)
        self.micro_losses = []
        loss_sum = torch.zeros((), device=self.device)
        judged = ()

        def ask(norm: torch.Tensor) -> bool:
            nonlocal judged
            judged = self._over_ranks(loss_sum, norm)
            return accepts(*judged)

        for index in range(self.batch.accumulation):
            idx, targets = (t.to(self.device, non_blocking=True) for t in next(micro_batches))
            _, loss = self.deepspeed(idx, targets)
            self.deepspeed.backward(loss)
            self.micro_losses.append(loss.detach().float())
            loss_sum += self.micro_losses[-1]
            if index + 1 < self.batch.accumulation:
                self.deepspeed.step()
        updated = self._gate.step(ask)
        mean_loss, norm = judged
        return StepResult(loss_sum / self.batch.accumulation, norm, not updated, mean_loss)

    def _over_ranks(self, loss_sum: torch.Tensor, norm: torch.Tensor) -> tuple[float, float]:
        """The mean loss of the global batch, of which every rank holds an equal share, and the norm, by one sum and one
        wait for the device; in fp64, where the mean of equal norms is that norm."""
        numbers = torch.stack([loss_sum / self.batch.accumulation, norm.to(loss_sum)]).double()
        torch.distributed.all_reduce(numbers)
        mean_loss, norm = (numbers / self.batch.ranks).tolist()
        return mean_loss, norm

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def whole(self, parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager:
        """These parameters whole while a block runs: ZeRO-3 gathers them. They must not be changed there."""
        return deepspeed.zero.GatheredParameters(list(parameters), enabled=self.stage == 3)

    @torch.no_grad()
    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch in evaluation mode: a sum over valid targets divided by all positions."""
        with evaluating(self.deepspeed):
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
        with evaluating(self.deepspeed):
            if self._uncompiled is None:
                return self.deepspeed(idx.to(self.device, non_blocking=True), targets, scores=True)
            with autocast_if_enabled(self.deepspeed):
                return self._uncompiled(idx.to(self.device, non_blocking=True), targets, scores=True)


@contextmanager
def evaluating(engine) -> Iterator[None]:
    """Evaluation mode of a DeepSpeed engine while the block runs."""
    training = engine.module.training
    engine.eval()
    try:
        yield
    finally:
        engine.train(training)


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
    if accelerator.device_name() == "cpu":
        unlink_own_buffer()


def _threads() -> int:
    """This rank's share of the machine's cores, or what OMP_NUM_THREADS says (torchrun sets 1 unasked)."""
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen is not None and not (chosen == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        return int(chosen)
    return max(1, len(os.sched_getaffinity(0)) // ranks_on_this_machine())
