"""Tasks beside lm-evaluation-harness's own HFLM: ``python -m megaresid.benchmark.evaluating --eval-data DIR``

Of the same weights, as a GPT of ours and as a GPT-2 of Hugging Face's, both on the same documents: how many a second
each answers, and whether they answer alike. In each round both run all tasks, one after the other, and the next round
begins with the other one. Exits with 1 where ours is slower and, in float32, where a log-likelihood differs by more
than ALLOWED, or an answer differs whose best two choices are further apart than that.
"""

import io
import json
import time
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import tyro

from megaresid.accelerator import choose_accelerator
from megaresid.benchmark.outputs import check_outputs, make_folders
from megaresid.benchmark.ratios import paired_ratio
from megaresid.errors import UserError, exits_with_user_errors

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from megaresid.evaluation.tasks import Tasks
    from megaresid.model.gpt import GPT

SCHEMA = 1
ALLOWED = 1e-4
RESOLUTION = 2**-22  # of a sum in fp32, which HFLM's is: it matters from 400 nats on
SEED = 42
HEADER = ("task", "ratio", "items", "ours/s", "HFLM/s", "largest difference", "other answers")
Samples = list[dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """Speed and agreement of tasks over a model of ours and over HFLM with the same weights."""

    eval_data: Path
    """Folder with the tasks' files."""
    run: Path | None = None
    """A run of a GPT-2 (vanilla residual connections, softmax attention); by default --model, untrained."""
    model: Literal["tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "tiny"
    """Whose shape it has, without --run."""
    tasks: str = "arc_easy,hellaswag,piqa,winogrande"
    """Separated by commas."""
    limit: int | None = None
    """The first so many documents of each task; by default all."""
    rounds: int = 3
    """Of each of the two."""
    sequences: int = 16
    """Of ours: a forward has as many positions as so many whole contexts."""
    hflm_batch: int = 64
    """Sequences per forward of HFLM."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; bfloat16 by autocast, in both."""
    threads: int | None = None
    """Of PyTorch's operators on a CPU, instead of its own choice."""
    json: Path | None = None
    """Write everything measured to this new file."""

    def check(self) -> None:
        """Raises UserError for what cannot be measured or kept."""
        for name in ("limit", "rounds", "sequences", "hflm_batch", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        check_outputs(self.json, None)


def pair(request: Request, model: "GPT") -> "tuple[LM, LM]":
    """Both as lm-evaluation-harness sees them, on the GPU where there is one: ours, and HFLM."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from data_prep.tokenizer import gpt2_encoding, gpt2_ranks
    from megaresid.evaluation.harness_model import HarnessModel
    from megaresid.evaluation.loaded import LoadedModel
    from megaresid.exchange.gpt2_config import config_of
    from megaresid.exchange.gpt2_names import our_names, to_gpt2
    from megaresid.exchange.tokenizer_files import write_tokenizer
    from megaresid.model.gpt import canonical_parameters

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, parameters = model.shape, canonical_parameters(model, model.prefixes)
    twin = GPT2LMHeadModel(GPT2Config(**config_of(shape))).eval()
    weights = to_gpt2(shape, ((name, parameters[name].detach()) for name in our_names(shape)))
    twin.load_state_dict(dict(weights), strict=False)
    with TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), gpt2_ranks(), shape.context)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    autocast = torch.bfloat16 if request.dtype == "bfloat16" else None
    ours = LoadedModel(model, device, autocast, request.sequences * shape.context)
    theirs = HFLM(
        pretrained=twin.to(device),
        tokenizer=tokenizer,
        batch_size=request.hflm_batch,
        device=str(device),
        mixed_precision_dtype=autocast,
    )
    return HarnessModel(ours, gpt2_encoding()), theirs


def run_once(model: "LM", built: "Tasks", limit: int | None) -> tuple[float, Samples]:
    """Seconds that it takes, and what was asked and answered: all but the building of tasks and models counts."""
    from lm_eval.evaluator import evaluate

    from megaresid.evaluation.tasks import quiet

    since = time.perf_counter()
    with quiet(), redirect_stderr(io.StringIO()):
        found = evaluate(model, built.loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    seconds = time.perf_counter() - since
    (samples,) = found["samples"].values()
    return seconds, samples


def differences(ours: Samples, theirs: Samples) -> dict[str, Any]:
    """The largest difference of log-likelihoods, how many are beyond what is allowed, how many differ in being the
    greedy choice, and the documents that are answered otherwise, with the margin between HFLM's best two choices."""
    largest, beyond, flags, answers = 0.0, 0, 0, []
    for mine, other in zip(ours, theirs, strict=True):
        scores = [[response[0] for response in sample["filtered_resps"]] for sample in (mine, other)]
        for one, two in zip(*scores, strict=True):
            largest = max(largest, abs(one - two))
            beyond += abs(one - two) > max(ALLOWED, RESOLUTION * abs(two))
        flags += sum(a[1] != b[1] for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True))
        for metric in mine["metrics"]:
            if mine[metric] != other[metric]:
                answers.append({"document": mine["doc_id"], "metric": metric, "margin": margin(metric, other)})
    return {"largest": largest, "beyond": beyond, "greedy": flags, "answers": answers}


def margin(metric: str, sample: dict[str, Any]) -> float:
    """Between the best two choices, in nats; for ``acc_norm`` per character of a choice."""
    values = [response[0] for response in sample["filtered_resps"]]
    if metric == "acc_norm":
        values = [v / (len(a[1]) - 1) for v, a in zip(values, sample["arguments"], strict=True)]
    best, second = sorted(values, reverse=True)[:2]
    return best - second


def measure(request: Request, model: "GPT") -> dict[str, dict[str, Any]]:
    """By task: documents, seconds of each round of both, the ratio of their speeds, and ``differences``."""
    from data_prep.tokenizer import gpt2_encoding
    from megaresid.evaluation.tasks import tasks

    names = request.tasks.split(",")
    built = {name: tasks([name], request.eval_data, gpt2_encoding(), request.limit) for name in names}
    for name, task in built.items():
        if task.loaded["tasks"][name].OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"--tasks {name}: it has no choices; compare arc_easy, hellaswag, piqa or winogrande")
    models = dict(zip(("ours", "HFLM"), pair(request, model), strict=True))
    for task in built.values():
        for each in models.values():
            run_once(each, task, 2)
    found = {name: {"seconds": {who: [] for who in models}} for name in names}
    for turn in range(request.rounds):
        for name, task in built.items():
            samples = {}
            for who in sorted(models, reverse=turn % 2 == 0):
                seconds, samples[who] = run_once(models[who], task, request.limit)
                found[name]["seconds"][who].append(seconds)
            found[name] |= {"items": len(samples["ours"]), **differences(samples["ours"], samples["HFLM"])}
    return found


def report(found: dict[str, dict[str, Any]], exact: bool) -> tuple[str, list[str]]:
    """A table, and the goals that were missed, each in a few words: agreement is one where products are ``exact``."""
    from megaresid.evaluation.report import table

    rows, missed = [HEADER], []
    for name, task in found.items():
        ours, theirs = task["seconds"]["ours"], task["seconds"]["HFLM"]
        ratio = paired_ratio(theirs, ours)
        speeds = [f"{task['items'] / median(seconds):.1f}" for seconds in (ours, theirs)]
        other = str(len(task["answers"]))
        rows.append((name, str(ratio), str(task["items"]), *speeds, f"{task['largest']:.2g}", other))
        if ratio.median < 1:
            missed.append(f"{name} is slower than HFLM")
        if exact and task["beyond"]:
            missed.append(f"{task['beyond']} log-likelihoods of {name} differ by more than {ALLOWED:g}")
        if exact and (clear := [answer for answer in task["answers"] if answer["margin"] > ALLOWED]):
            missed.append(f"{len(clear)} documents of {name} are answered otherwise, and by no close margin")
    lines = [
        f"{name}, document {a['document']}: another {a['metric']}, HFLM's margin is {a['margin']:.2g}"
        for name, task in found.items()
        for a in task["answers"]
    ]
    return "\n".join([table(rows), *lines]), missed


def main(request: Request) -> None:
    choose_accelerator()
    request.check()
    import torch

    from megaresid.exchange.gpt2_config import check_is_gpt2
    from megaresid.model.gpt import build
    from megaresid.model.plan import ModelPlan
    from megaresid.model.presets import PRESETS
    from megaresid.saved_run import open_saved
    from megaresid.training.run_dir import environment, write_json

    if request.threads:
        torch.set_num_threads(request.threads)
    saved = open_saved(request.run) if request.run else None
    plan = saved.plan if saved else ModelPlan(PRESETS[request.model])
    check_is_gpt2(plan)
    make_folders(request.json, None)
    print(
        f"{request.run or f'untrained {request.model}'}, {request.dtype}, {torch.get_num_threads()} thread(s), "
        f"{request.rounds} round(s)",
        flush=True,
    )
    found = measure(request, saved.model() if saved else build(plan, SEED))
    text, missed = report(found, exact=request.dtype == "float32")
    print(text)
    if request.json is not None:
        options = json.loads(json.dumps(asdict(request), default=str))
        tree = {"schema": SCHEMA, "options": options, "environment": environment(), "missed": missed, "tasks": found}
        write_json(request.json, tree)
    print(f"goals missed: {'; '.join(missed)}" if missed else "all goals are met")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    exits_with_user_errors(lambda: main(tyro.cli(Request, prog="python -m megaresid.benchmark.evaluating")))()
