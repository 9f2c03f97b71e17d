"""A small GPT under the real loop with hooks; what it told is kept on every rank."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from gpt_runs import FUSED_ADAMW, VOCABULARY, configuration, micro_batches, sample, start_engine

from megaresid.config import IntervalOptions
from megaresid.evaluation.hook import Hook
from megaresid.evaluation.scoring import Request, score
from megaresid.evaluation.validation import Validation
from megaresid.training.checkpoint import read_parameters, save_checkpoint
from megaresid.training.loop import Course, train
from megaresid.training.schedule import learning_rate

END = 4


class Told:
    """In a recorder's place."""

    def __init__(self):
        self.rows, self.lines = [], []

    def record(self, step, row, failed=None):
        self.rows.append({"step": step, **row} | ({"failed": failed} if failed else {}))

    def evaluation_line(self, step, row):
        self.lines.append(f"step {step}: {', '.join(row)}")

    def say(self, line):
        self.lines.append(line)

    def advance(self, step):
        pass

    def progress_line(self, step, row):
        pass

    def named(self, *names) -> list[tuple]:
        """(step, values) of the rows that have all of these numbers."""
        return [(row["step"], *(row[name] for name in names)) for row in self.rows if set(names) <= row.keys()]


class Run:
    """To step END with a checkpoint every second step, on every rank."""

    def __init__(self, folder: str, name: str, stage: int = 1, hooks=(), strict=False, **options):
        rank = dist.get_rank()
        options = {"dropout": 0.1, "micro_batch_size": 2, "steps": END} | options
        config = configuration(**options)
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        tree = {"optimizer": FUSED_ADAMW, "zero_optimization": zero}
        self.engine = start_engine(config, tree, folder)
        torch.manual_seed(100 + rank)
        random.seed(rank)
        np.random.seed(rank)
        self.told, self.saved = Told(), {}

        def save(step, counters):
            self.saved[step] = save_checkpoint(
                self.engine.deepspeed,
                self.engine.parameters,
                Path(folder) / name,
                step=step,
                counters=counters,
                identity={},
            )

        course = Course(
            first=0,
            training_seconds=0.0,
            skipped_steps=0,
            steps=END,
            tokens_per_step=192,
            learning_rate=lambda step: learning_rate(step, END, config.optimizer),
            flops_per_token=1,
            peak_flops=None,
            pending=[hook.name for hook in hooks],
        )
        intervals = IntervalOptions(log_interval=1, checkpoint_interval=2)
        source = micro_batches(config, self.engine.batch, rank)
        self.error = None
        try:
            train(self.engine, source, course, intervals, hooks, save, self.told, strict)
        except Exception as error:
            self.error = error
        self.engine.deepspeed.destroy()

    def training(self) -> list[tuple]:
        return self.told.named("train_loss", "gradient_norm")

    def end(self) -> dict[str, torch.Tensor]:
        return read_parameters(self.saved[END])


class Stream:
    """300 tokens."""

    def __len__(self):
        return 300

    def read_windows(self, windows, context):
        return (windows[:, None] * context + np.arange(context + 1)) % 50


def validation(engine) -> dict[str, float]:
    return Validation(Stream(), context=engine.context, tokens=300, vocab_size=VOCABULARY)(engine)


def scores(engine) -> dict[str, float]:
    """Requests of many lengths."""
    texts = [sample(index, engine.context).tolist() for index in range(7)]
    requests = [Request(text[:1], text[1 : 3 + 3 * n]) for n, text in enumerate(texts)]
    found = score(engine, requests, progress=False)
    return {"nats": -sum(one.log_probability for one in found)}


def careless(engine) -> dict[str, float]:
    """Draws from every generator, and leaves PyTorch and the model in another state."""
    drawn = [torch.rand(()).item(), random.random(), np.random.rand()]
    scores(engine)
    engine.deepspeed.eval()
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    engine.set_step(1000)
    return {f"drawn{n}": number for n, number in enumerate(drawn)}


def raises(engine) -> dict[str, float]:
    careless(engine)
    raise ValueError("no\nluck")


MANY = (
    Hook("validation", 1, validation),
    Hook("scores", 1, scores),
    Hook("careless", 2, careless),
    Hook("raises", 1, raises),
)
