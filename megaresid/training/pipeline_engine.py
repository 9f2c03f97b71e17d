"""A model cut into the stages of a DeepSpeed pipeline, behind the contract of ``training/engine.py``.

Ranks stand stage by stage: rank r is data-parallel rank r mod D of stage r // D. Those with one data-parallel rank are
a pipeline and train on the same micro-batches. For evaluation every rank still brings a micro-batch of its own: those
of a pipeline's ranks go through it one behind the other, and each rank gets the result of its own.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import deepspeed.runtime.pipe.engine as deepspeed_pipe
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedConfig as Settings
from deepspeed import set_optimizer_flags
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.torch_autocast import autocast_if_enabled
from deepspeed.utils import groups

from megaresid.config import RunConfig
from megaresid.evaluation.loaded import check_length
from megaresid.model.gpt import GPT, TOKENS, Head, canonical_parameters, canonical_rules, set_step
from megaresid.model.pipeline import pipeline_module
from megaresid.model.plan import ModelPlan
from megaresid.training.ds_config import Batch, DeepSpeedConfig
from megaresid.training.engine import StepResult, evaluating
from megaresid.training.health import finite
from megaresid.training.initial import parameter_starts
from megaresid.training.optimizer import parameter_groups, set_learning_rate, total_norm
from megaresid.training.rules import overridden

# The shapes of a stage's tensors go ahead of them in one message. Theirs has room for 50 tensors, and a history of all
# sublayers is longer in a deep model.
deepspeed_pipe.TENSOR_META_SIZE = 4096


class Schedule(deepspeed_pipe.PipelineEngine):
    """DeepSpeed's engine of one stage, which runs micro-batches forward and backward in turn (1F1B).

    ``ask(norm)``, set before each step, says on all ranks alike whether the update is made. The norm is that of the
    whole model's gradient before clipping, the tied embedding counted once.
    """

    ask: Callable[[torch.Tensor], bool]

    def __init__(self, module: PipelineModule, parameters: list[dict], tree: dict[str, Any], clip: float):
        self._unsharded = tree["zero_optimization"]["stage"] == 0
        if self._unsharded:
            # By the whole model's norm, in ``_exec_optimizer_step``: theirs is of the first stage alone.
            tree = tree | {"gradient_clipping": 0.0}
        grid = module.mpu()
        settings = Settings(tree, grid)
        set_optimizer_flags(settings, module)
        super().__init__(
            args=None, model=module, model_parameters=parameters, mpu=grid, config=tree, config_class=settings
        )
        self._clip = clip
        if module.loss_fn is not None:
            module.loss_fn = self._under_autocast(module.loss_fn)
        if not self._unsharded:
            self._stand_before_the_update()

    def _under_autocast(self, loss_fn: Callable) -> Callable:
        def loss(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            with autocast_if_enabled(self):
                return loss_fn(hidden, targets)

        return loss

    def _stand_before_the_update(self) -> None:
        """Have ZeRO 1 take its norm over all stages by one sum, whatever groups of parameters each stage has (it would
        sum group by group, and hang where one stage has more), and ask: it drops a step whose norm is not finite."""
        zero = self.optimizer
        zero.model_parallel_group = None
        norm_of_stage = zero.scaled_global_norm

        def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
            norm = self._over_stages(norm_of_stage(norm_type))
            return norm if self.ask(norm) else torch.full_like(norm, float("inf"))

        zero.scaled_global_norm = scaled_global_norm

    def _over_stages(self, norm: torch.Tensor) -> torch.Tensor:
        square = norm.to(self.device, torch.float32).square()
        dist.all_reduce(square, group=self.grid.get_pipe_parallel_group())
        return square.sqrt()

    def _exec_optimizer_step(self, lr_kwargs: dict | None = None) -> None:
        if self._unsharded:
            trained = [p for p in self.module.parameters() if p.grad is not None]
            own = [p.grad for p in trained if not p.ds_pipe_replicated]
            norm = self._over_stages(total_norm(own))
            if not self.ask(norm):
                self.zero_grad()  # the optimizer passes over a parameter without a gradient
                self.skipped_steps += 1
            elif self._clip > 0:
                torch.nn.utils.clip_grads_with_norm_(trained, self._clip, norm)
        super()._exec_optimizer_step(lr_kwargs)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        """One pass for all tensors that this stage has sent. Theirs makes one for each, through the whole stage, and a
        history is many tensors."""
        if self.is_last_stage():
            super()._exec_backward_pass(buffer_id)
            return
        outputs, gradients = self.pipe_buffers["outputs"][buffer_id], self.grad_layer
        if isinstance(outputs, torch.Tensor):
            outputs, gradients = (outputs,), (gradients,)
        self._running_engine_backward = True
        try:
            torch.autograd.backward([tensor for tensor in outputs if tensor.is_floating_point()], gradients)
        finally:
            self._running_engine_backward = False
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None

    def _allocate_or_extend_buffers(self, idx: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        """A buffer of its own for each tensor: theirs may hand out one of another type again."""
        return torch.zeros(shape, dtype=dtype, device=self.device)

    # The schedule's instructions find their methods here, not by name.
    _INSTRUCTION_MAP = deepspeed_pipe.PipelineEngine._INSTRUCTION_MAP | {
        deepspeed_pipe.schedule.OptimizerStep: _exec_optimizer_step,
        deepspeed_pipe.schedule.BackwardPass: _exec_backward_pass,
    }

    def destroy(self) -> None:
        super().destroy()
        groups.mpu = None  # or the pipeline's ranks would be those of every later engine of the process
        # The hooks of a loss hold the engine, and the engine its last loss: a circle through autograd that no garbage
        # collection sees.
        self.loss = self.total_loss = None
        self.pipe_buffers.clear()
        # Nothing else gives back the groups of the grid and the module, and each has threads of its own.
        grid, module = self.grid, self.module
        own = [grid.ds_model_proc_group, grid.dp_proc_group, grid.pp_proc_group, grid.slice_proc_group]
        for group in [*own, module.world_group, *(tied["group"] for tied in module.tied_comms.values())]:
            dist.destroy_process_group(group)

    def send(self, tensors: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """To the next stage, in evaluation: any shapes."""
        self._send_tensor_meta(tensors, self.next_stage)
        for tensor in (tensors,) if isinstance(tensors, torch.Tensor) else tensors:
            p2p.send(tensor.contiguous(), self.next_stage)

    def receive(self) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What the stage before sends."""
        tensors = self._recv_tensor_meta(self.prev_stage)
        for tensor in (tensors,) if isinstance(tensors, torch.Tensor) else tensors:
            p2p.recv(tensor, self.prev_stage)
        return tensors


class PipelineEngine:
    """As ``Engine``, with ``config.execution.pipeline_stages`` stages and ZeRO 0 or 1; every rank calls every method.

    ``parameters`` are those of this rank's stage; the tied embedding is in the first and in the last. ``data_rank`` is
    the data-parallel rank, whose micro-batches this rank trains on.
    """

    def __init__(self, plan: ModelPlan, config: RunConfig, ds_config: DeepSpeedConfig, batch: Batch):
        stages, recompute = config.execution.pipeline_stages, config.execution.activation_checkpointing
        module, prefixes = pipeline_module(plan, stages, config.run.seed, recompute)
        self.parameters = canonical_parameters(module, prefixes)
        with torch.device("meta"):
            whole = GPT(plan)  # a text may match parameters of other stages alone
        rules = overridden(canonical_rules(whole, whole.prefixes, plan), config.optimizer.parameter_rules)
        grouped = parameter_groups(self.parameters, rules, config.optimizer, ds_config.epsilon)
        self.starts = parameter_starts(self.parameters, rules)
        self.device = torch.device(get_accelerator().current_device_name())
        self.set_step = functools.partial(set_step, module)
        self.deepspeed = Schedule(module, grouped, ds_config.engine, config.optimizer.clip)
        self.micro_losses: list[torch.Tensor] = []
        self.batch = batch
        self.stage = ds_config.stage
        self.data_rank = self.deepspeed.grid.get_data_parallel_id()
        self.context, self.vocab_size = plan.shape.context, plan.shape.vocab_size
        self.positions_per_forward = batch.micro * plan.shape.context
        self._head = Head(module.tied_modules[TOKENS]) if self.deepspeed.is_last_stage() else None

    def train_step(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        learning_rate: float,
        accepts: Callable[[float, float], bool] = finite,
    ) -> StepResult:
        """As ``Engine.train_step``; the loss of a rank is its pipeline's, and the last stage has those of the
        micro-batches."""
        engine, judged = self.deepspeed, ()
        # Taken in every stage and before the first message, so that no stage waits for one that cannot read its data.
        taken = list(islice(micro_batches, self.batch.accumulation))
        set_learning_rate(engine.optimizer.param_groups, learning_rate)
        skipped_before = engine.skipped_steps

        def ask(norm: torch.Tensor) -> bool:
            nonlocal judged
            self.micro_losses = [loss.float() for loss in engine.fwd_outputs]
            judged = self._over_ranks(norm)
            return accepts(*judged)

        engine.ask = ask
        engine.train_batch(iter(taken))
        mean_loss, norm = judged
        return StepResult(engine.dp_group_loss, norm, engine.skipped_steps > skipped_before, mean_loss)

    def _over_ranks(self, norm: torch.Tensor) -> tuple[float, float]:
        """The mean loss of the global batch, which the last stages know, and the norm, that all have, by one sum."""
        loss = self.deepspeed.total_loss / self.batch.accumulation if self._head else torch.zeros_like(norm)
        numbers = torch.stack([loss.to(norm), norm]).double()
        dist.all_reduce(numbers)
        loss, norm = numbers.tolist()
        norm = norm / dist.get_world_size()
        return loss / self.batch.ranks, norm if norm == norm else float("inf")

    @torch.no_grad()
    def loss(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch in evaluation mode: a sum over valid targets divided by all positions."""
        losses = []
        for hidden, targets in self._through(idx, targets):
            losses.append(self._head.loss(hidden, targets) if self._head else torch.zeros((), device=self.device))
        losses = torch.stack(losses).float()
        self._from_last_stage(losses)
        return losses[self.deepspeed.stage_id]

    @torch.no_grad()
    def score(self, idx: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Engine.score``; a sequence above ``context`` is refused on all ranks of its pipeline."""
        counts, log_p, greedy = [], [], []
        for hidden, targets in self._through(idx, targets):
            counts.append(int((targets >= 0).sum()))
            found = torch.zeros(2, counts[-1], device=self.device)
            if self._head:
                found[0], found[1] = self._head(hidden, targets, scores=True)
            log_p.append(found[0])
            greedy.append(found[1])
        found = torch.stack([torch.cat(log_p), torch.cat(greedy)])
        self._from_last_stage(found)
        log_p, greedy = found.split(counts, dim=1)[self.deepspeed.stage_id]
        return log_p, greedy > 0

    def _through(
        self, idx: torch.Tensor, targets: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor]]:
        """The micro-batches of this pipeline's ranks in turn, each run through this stage in evaluation mode and sent
        on: what came out, the hidden states in the last stage, and its targets."""
        engine = self.deepspeed
        micro_batches = self._of_pipeline(idx, targets)
        with evaluating(engine), autocast_if_enabled(engine):
            for idx, targets in micro_batches:
                x = engine.module(idx if engine.is_first_stage() else engine.receive())
                if not engine.is_last_stage():
                    engine.send(x)
                yield x, targets

    def _of_pipeline(self, idx: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The micro-batches of this pipeline's ranks, in the order of their stages, on each of them."""
        grid = self.deepspeed.grid
        group, members = grid.get_pipe_parallel_group(), grid.pp_group
        several = targets.shape[2] if targets.ndim == 3 else 0
        own = torch.tensor([*idx.shape, several], device=self.device)
        shapes = [torch.empty_like(own) for _ in members]
        dist.all_gather(shapes, own, group=group)
        micro_batches = []
        for member, shape in zip(members, torch.stack(shapes).tolist(), strict=True):
            *shape, several = shape
            of_member = []
            for mine, size in ((idx, shape), (targets, shape + [several] if several else shape)):
                theirs = torch.empty(size, dtype=torch.int64, device=self.device)
                theirs = mine.to(self.device).contiguous() if member == dist.get_rank() else theirs
                dist.broadcast(theirs, src=member, group=group)
                of_member.append(theirs)
            check_length(of_member[0], self.context)
            micro_batches.append(tuple(of_member))
        return micro_batches

    def _from_last_stage(self, found: torch.Tensor) -> None:
        grid = self.deepspeed.grid
        dist.broadcast(found, src=grid.pp_group[-1], group=grid.get_pipe_parallel_group())
