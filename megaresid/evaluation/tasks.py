"""Tasks of lm-evaluation-harness over a live engine or a loaded model."""

import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import tiktoken

from megaresid.errors import UserError, suggestion
from megaresid.evaluation.hook import Measurable

FEWSHOT_SEED = 1234
"""lm-evaluation-harness's own default, for the examples that it draws for a task with few-shot prompts."""


class Tasks:
    """Tasks that are built already, to be run on models: what ``tasks`` returns.

    ``loaded`` is what lm-evaluation-harness makes of them, ``files`` the files that they were read from, and ``items``
    the number of documents of each in the last run.
    """

    def __init__(
        self, loaded: dict[str, Any], encoding: tiktoken.Encoding, limit: int | None, files: dict[str, Path]
    ):
        self.loaded, self._encoding, self._limit = loaded, encoding, limit
        self.files = files
        self.items: dict[str, int] = {}

    def __call__(self, engine: Measurable) -> dict[str, float]:
        """``TASK/METRIC`` for each metric of each task, and of each group that has any, with ``METRIC_stderr`` where
        the metric is a mean. Called by every rank; the same on all. Raises UserError where the model's vocabulary is
        not the tokenizer's."""
        from lm_eval.evaluator import evaluate

        from megaresid.evaluation.harness_model import HarnessModel

        if engine.vocab_size != self._encoding.n_vocab:
            raise UserError(
                f"tasks {', '.join(self.loaded['tasks'])}: they are encoded by GPT-2's tokenizer, of "
                f"{self._encoding.n_vocab} ids, and the model predicts {engine.vocab_size}: leave them out"
            )
        for task in self.loaded["tasks"].values():
            # Each run draws the same examples: without it the second would go on in the first one's sequence.
            task.set_fewshot_seed(FEWSHOT_SEED)
        model = HarnessModel(engine, self._encoding)
        with quiet():
            found = evaluate(model, self.loaded, limit=self._limit, bootstrap_iters=1, log_samples=False)
        self.items = {name: count["effective"] for name, count in found["n-samples"].items()}
        return {
            f"{task}/{_metric(key)}": float(value)
            for task, metrics in found["results"].items()
            for key, value in metrics.items()
            if key != "sample_len" and isinstance(value, int | float)
        }


def tasks(names: Sequence[str], data: Path | None, encoding: tiktoken.Encoding, limit: int | None = None) -> Tasks:
    """Build tasks by their names in lm-evaluation-harness, with their data.

    Args:
        names: Tasks, groups or tags of lm-evaluation-harness; with ``data`` those of ``offline_tasks`` alone.
        data: The folder of ``--eval-data``: nothing is then asked of the network. None for the Hub, or what is cached
            of it; ranks that ask at once wait for the first.
        encoding: Of the model's tokens.
        limit: The first so many documents of each task; all without it.

    Raises:
        UserError: lm-evaluation-harness is not installed; an unknown task, or one that wants more of a model than
            scores of text; data that is missing, damaged or out of reach.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"task {names[0]!r} needs lm-evaluation-harness: pip install 'megaresid[eval]'")
    from megaresid.evaluation import offline_tasks

    files = {}
    with quiet():
        if data is None:
            loaded = _load_from_hub(names)
        else:
            loaded, files = offline_tasks.load(names, data)
    for name, task in loaded["tasks"].items():
        _refuse_beyond_scores(name, task.OUTPUT_TYPE, task)
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
    return Tasks(loaded, encoding, limit, files)


def _load_from_hub(names: Sequence[str]) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"unknown task {name!r}: {_nearest(name, manager)}")
        _refuse_beyond_scores(name, (manager.task_index[name].cfg or {}).get("output_type"))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"reading {', '.join(names)} from the Hugging Face Hub, or from its cache", file=sys.stderr, flush=True)
    try:
        return manager.load(list(names))
    except Exception as error:  # whatever a task's own code, its libraries or the network can raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{', '.join(names)}: cannot be loaded ({reason[:300]}); where the Hugging Face Hub cannot be reached, "
            "give the data by --eval-data DIR"
        ) from error


def _nearest(name: str, manager) -> str:
    tail = suggestion(name, manager.all_tasks)
    return tail if tail.startswith("did") else f"it is none of the {len(manager.all_tasks)} of lm-evaluation-harness"


def _refuse_beyond_scores(name: str, output_type: str | None, task: Any = None) -> None:
    if output_type == "generate_until":
        raise UserError(f"task {name!r} has the model generate text: only tasks that score given text can be run")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name!r} is of images or sound: only tasks of text can be run")
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"task {name!r} runs code that a model wrote: such tasks are not run")


def _metric(key: str) -> str:
    """lm-evaluation-harness writes ``metric,filter`` and ``metric_stderr,filter``; ours are ``metric`` where the filter
    does nothing, else ``metric.filter``, and then ``_stderr``."""
    metric, _, filtered = key.partition(",")
    name = metric.removesuffix("_stderr")
    stderr = metric[len(name) :]
    return f"{name}{stderr}" if filtered == "none" else f"{name}.{filtered}{stderr}"


@contextmanager
def quiet() -> Iterator[None]:
    """While the block runs, lm-evaluation-harness shows no bars and logs errors alone, and it gives standard errors
    of means alone: it would resample for the others, in as many new processes as there are cores. It keeps its
    templates, each of which it would compile anew for each document, at 2 ms."""
    import lm_eval.api.task
    import lm_eval.evaluator_utils
    import lm_eval.utils
    from lm_eval.api.metrics import mean, mean_stderr

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with ExitStack() as stack:
        stack.callback(logger.setLevel, level)
        stack.enter_context(_replaced(lm_eval.api.task, "tqdm", lambda items, **_: items))
        stack.enter_context(
            _replaced(lm_eval.evaluator_utils, "stderr_for_metric", lambda metric, **_: {mean: mean_stderr}.get(metric))
        )
        templates = lm_eval.utils.env
        stack.enter_context(_replaced(templates, "from_string", functools.cache(templates.from_string)))
        yield


@contextmanager
def _replaced(module: Any, name: str, value: Callable) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
