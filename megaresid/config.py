"""The run configuration: one typed tree, from a preset, a JSON file and the command line (which wins).

Every key has one name everywhere: ``--learning-rate`` on the command line is ``learning_rate`` in the JSON.
"""

import os
import sys
from collections import Counter
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from megaresid.errors import UserError, suggestion
from megaresid.evaluation.chosen import parse as parse_entries
from megaresid.json_text import parse_json
from megaresid.model.presets import PRESETS, ModelShape
from megaresid.training.identity import parse_allowed

if TYPE_CHECKING:
    from megaresid.model.plan import ModelPlan


class Section(BaseModel):
    """Base of the tree's sections: typed, immutable, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunOptions(Section):
    """The run and where it is kept."""

    data: tuple[Path, ...] = ()
    """Folder of shards with a manifest, made by `python -m data_prep`. Several folders are blended."""
    data_weights: tuple[float, ...] = ()
    """Of several folders: the sequences that come from each are as these numbers; by default as the tokens it has."""
    data_order: Literal["shuffled", "sequential"] = "shuffled"
    """Shuffled without replacement, anew in each epoch, or from front to back."""
    align_documents: bool = False
    """Begin each training sequence with a document where one begins soon enough."""
    run_dir: Path | None = None
    """Where the run is written; it must be new, or --resume must be given."""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON: ZeRO, offload, precision, optimizer type (see ds_configs/)."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    seed: int = 42
    """Seeds the initial weights, the order of the data and dropout."""
    resume: str | None = None
    """`auto`: go on from the newest complete checkpoint of --run-dir, if there is one. Or a checkpoint's path."""
    allow_other: str = ""
    """Of a resume: what may be another than the checkpoint's, as in "data,seed", which is refused otherwise: data,
    tokenizer, spec, global_batch_size, seed, optimizer. The first lines of the run say what it means."""
    init_from: Path | None = None
    """Start from the weights (only) of this run, checkpoint or exported folder."""
    dry_run: bool = False
    """Print parameters, tokens, FLOPs, memory per rank and the resolved JSON, then stop."""

    @field_validator("data", mode="before")
    @classmethod
    def _one_folder(cls, data: Any) -> Any:
        """One folder may stand alone: so it does in the files of runs from before several were blended."""
        return (data,) if isinstance(data, str | Path) else () if data is None else data


class ModelOptions(Section):
    """The model: a preset, what differs from it, and its layer specs."""

    model: str = "gpt2-medium"
    """tiny, gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    attention: str = "softmax"
    """How layers mix tokens: a pattern over the depth, such as "3*gated_delta_net + softmax"; all mixers are listed by
    python -m megaresid.variants."""
    positions: Literal["auto", "learned", "none"] = "auto"
    """Learned position embeddings: auto has them where a mixer cannot tell the order of tokens without."""
    separate_documents: bool = False
    """Let no token see another document: attention, states and convolutions stop at <|endoftext|>."""
    residual: str = "vanilla"
    """How layers add to the residual stream: a pattern over the depth, of the variants listed there."""
    layers: int | None = None
    """Instead of the preset's."""
    heads: int | None = None
    """Instead of the preset's."""
    width: int | None = None
    """Instead of the preset's."""
    context: int | None = None
    """Tokens per sequence, instead of the preset's."""
    dropout: float = 0.0
    """Dropout of embeddings, attention and sublayer outputs."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """GPT-2's tanh form, or the exact GELU."""


class BatchOptions(Section):
    """Sequences per step."""

    global_batch_size: int = 512
    """Sequences per optimizer step, over all ranks and accumulation."""
    micro_batch_size: int | None = None
    """Sequences per rank and forward; by default the largest divisor of a rank's share up to 16."""


class OptimizerOptions(Section):
    """The optimizer's values (its type is named in the DeepSpeed JSON) and the learning rate's course."""

    learning_rate: float = 3e-4
    """The peak."""
    min_learning_rate: float = 3e-5
    """Where the schedule ends."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Cosine, warm-up/stable/decay, or constant after the warm-up."""
    warmup_fraction: float = 0.02
    """Part of the steps that warms up linearly."""
    decay_fraction: float = 0.2
    """Part of the steps that decays linearly at the end of wsd."""
    weight_decay: float = 0.1
    """Of the parameters whose rule says that they decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of the Adam family."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for none."""
    parameter_rules: tuple[str, ...] = ()
    """Changes of what parameters declare, later ones winning: "layers.*.site.gate.*:lr_multiplier=5,decay=false". Globs
    over canonical names; keys are decay, lr_multiplier and fp32 (see python -m megaresid.variants NAME)."""


class ExecutionOptions(Section):
    """How the model is run."""

    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and recompute the rest."""
    compile: bool = False
    """torch.compile of the whole model (ZeRO 0 to 2)."""
    hang_timeout: float = 1200.0
    """Seconds without progress on a rank (a forward, a step, a save), after which the run ends and names the rank that
    the others wait for; four times as many until the first step is made. 0 for never."""
    pipeline_stages: int = 1
    """Cut the layers into so many stages, one rank each (ZeRO 0 or 1); they must divide the ranks."""


class IntervalOptions(Section):
    """What happens how often, in steps; 0 for never."""

    log_interval: int = 10
    """Progress line, metrics.jsonl and TensorBoard."""
    checkpoint_interval: int = 1000
    """Checkpoint, at the end too."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept; 0 for all."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good; 0 for none."""
    diagnose_interval: int = 250
    """What the stream, the sites and the mixers do over depth, in metrics.jsonl and TensorBoard; not in a pipeline."""


class HealthOptions(Section):
    """What is done about a step whose loss or gradient is not as usual. One that is not finite is never applied."""

    on_spike: Literal["none", "skip", "rollback", "stop"] = "skip"
    """A loss or gradient norm far above the usual: apply it, skip the update, skip it and after --max-bad-steps go back
    to the last good checkpoint and past those batches, or end the run at the first bad step."""
    spike_threshold: float = 8.0
    """Far above: so many standard deviations over the mean of the last good steps."""
    spike_window: int = 100
    """How many good steps that is; there are no spikes before."""
    max_bad_steps: int = 10
    """The run stops after so many skipped updates in a row (exit code 76), or goes back where rollback is chosen."""


class EvaluationOptions(Section):
    """What is measured during training."""

    eval: str = "validation@1000"
    """What and when, as in "validation@500 wikitext2,lambada@1000 arc_easy,hellaswag@end": every so many steps and at
    both ends, or at the end alone. Names: validation, wikitext2, lambada, a function of your own (module:function), or
    tasks of lm-evaluation-harness. Empty for nothing."""
    eval_data: Path | None = None
    """Folder with the texts and tasks of --eval; by default they come from the Hub."""
    eval_strict: bool = False
    """End the run when an evaluation fails, instead of going on without its numbers."""
    validation_tokens: int = 10_485_760
    """Tokens of the fixed validation set, or all that there are."""


class RunConfig(Section):
    """Train a language model under DeepSpeed.

    Start it with the launcher: deepspeed --module megaresid.train --deepspeed_config ds_configs/zero1.json …,
    with torchrun -m megaresid.train …, or as one process with python -m megaresid.train …
    """

    run: RunOptions = RunOptions()
    model: ModelOptions = ModelOptions()
    batch: BatchOptions = BatchOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    execution: ExecutionOptions = ExecutionOptions()
    interval: IntervalOptions = IntervalOptions()
    health: HealthOptions = HealthOptions()
    evaluation: EvaluationOptions = EvaluationOptions()

    @property
    def shape(self) -> ModelShape:
        """The preset with what the options change of it."""
        chosen = self.model
        changes = {key: getattr(chosen, key) for key in ("layers", "heads", "width", "context")}
        changes = {key: value for key, value in changes.items() if value is not None}
        changes |= {"dropout": chosen.dropout, "activation": chosen.activation}
        return PRESETS[chosen.model].model_copy(update=changes)

    def plan(self) -> "ModelPlan":
        """Raises UserError for layer specs that cannot be built."""
        from megaresid.model.plan import ModelPlan  # for torch, --help need not wait

        chosen = self.model
        return ModelPlan(
            self.shape, chosen.attention, chosen.residual, chosen.positions, documents=chosen.separate_documents
        )

    def flat(self) -> dict[str, Any]:
        """Every key with its value, JSON-able, as ``--config`` reads it."""
        return {key: value for section in self.model_dump(mode="json").values() for key, value in section.items()}


GIVEN_ONCE = {
    "--parameter-rules": "give all rules to one, each in quotes",
    "--data": "give all folders to one",
    "--data-weights": "give all weights to one",
    "--eval": "give all entries to one, in one pair of quotes",
}
"""Options that hold several values: of two of them the parser would keep the last without a word."""

MOST = 2**48
"""Of any number: their products are still counted in 64 bits, or told to be too many for the data."""

SECTIONS: dict[str, str] = {
    key: section for section, field in RunConfig.model_fields.items() for key in field.annotation.model_fields
}

REFERENCE = {
    "model": "gpt2-medium",
    "steps": 13_535,
    "global_batch_size": 512,
    "learning_rate": 3e-4,
    "min_learning_rate": 3e-5,
    "schedule": "cosine",
    "warmup_fraction": 0.02,
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "clip": 1.0,
    "eval": "validation@1000",
    "seed": 1337,
}
RUN_PRESETS: dict[str, dict[str, Any]] = {"reference": REFERENCE, "mlsbench-345m": REFERENCE | {"seed": 42}}


def from_flat(values: dict[str, Any], source: str, base: RunConfig | None = None) -> RunConfig:
    """A tree with ``values`` (flat keys) over ``base``. ``source`` names the file or preset in errors.

    Raises UserError for an unknown key (naming the nearest one) and for a value of the wrong type.
    """
    tree = (base or RunConfig()).model_dump()
    for key, value in _upgraded(values).items():
        name = key.replace("-", "_")
        if name not in SECTIONS:
            raise UserError(f"{source}: unknown key {key!r}: {suggestion(name, SECTIONS)}")
        tree[SECTIONS[name]][name] = value
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        key = problem["loc"][1]
        raise UserError(f"{source}: {key}={problem['input']!r} is not valid: {problem['msg']}") from None


def _upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Keys of an earlier version, as config.json of an older run has them, in today's words.

    ``validation_interval`` N was validation@N of ``eval``, and 0 no validation.
    """
    if "validation_interval" not in values:
        return values
    values = dict(values)
    interval = values.pop("validation_interval")
    return {"eval": f"validation@{interval}" if interval else ""} | values


def parse(arguments: list[str]) -> RunConfig:
    """The configuration of a command line: preset, then ``--config`` file, then the options, later ones winning.

    ``--local_rank``, which the DeepSpeed launcher adds, is dropped. Raises UserError; exits 2 with tyro's message
    for a value of the wrong type, 0 for ``--help``.
    """
    arguments, taken = _take(arguments, "--preset", "--config", "--local_rank")
    given = Counter(argument.split("=")[0].replace("_", "-") for argument in arguments)
    for name, mend in GIVEN_ONCE.items():
        if given[name] > 1:
            raise UserError(f"{name} is given twice: {mend}")
    base = RunConfig()
    if preset := taken["--preset"]:
        if preset not in RUN_PRESETS:
            raise UserError(f"--preset {preset}: {suggestion(preset, RUN_PRESETS)}")
        base = from_flat(RUN_PRESETS[preset], f"preset {preset}")
    if path := taken["--config"]:
        base = from_flat(read_object(Path(path), "--config"), path, base)
    config, unknown = tyro.cli(
        tyro.conf.OmitArgPrefixes[RunConfig],
        args=arguments,
        default=base,
        return_unknown_args=True,
        prog="python -m megaresid.train",
        description=f"{cleandoc(RunConfig.__doc__)}\n\n--preset {'|'.join(RUN_PRESETS)} sets the reference run's "
        "values, --config FILE reads the same keys from a JSON; options given here win over both.",
        console_outputs=os.environ.get("RANK", "0") == "0",
    )
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        if "@" in name:
            raise UserError(f"unknown argument {unknown[0]}: give all entries of --eval in one pair of quotes")
        if name == "validation_interval":
            raise UserError(f'unknown option {unknown[0]}: it is now --eval "validation@STEPS"')
        raise UserError(f"unknown option {unknown[0]}: {suggestion(name, SECTIONS).replace('_', '-')}")
    _check(config)
    return config


def _take(arguments: list[str], *names: str) -> tuple[list[str], dict[str, str | None]]:
    """Take ``--name value`` and ``--name=value`` out of the arguments."""
    rest, taken = [], dict.fromkeys(names)
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name in taken:
            taken[name] = value if equals else next(waiting, None)
            if taken[name] is None:
                raise UserError(f"{name} needs a value")
        else:
            rest.append(argument)
    return rest, taken


def read_object(path: Path, option: str) -> dict[str, Any]:
    """The object in a JSON file that ``option`` names, without its schema version; raises UserError."""
    try:
        values = parse_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{option} {path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{option} {path}: expected an object of keys and values")
    values.pop("schema", None)
    return values


def _check(config: RunConfig) -> None:
    """Values that have a type but no sense: the first one is a UserError naming the option."""
    for key in ("data", "run_dir", "deepspeed_config"):
        if getattr(config.run, key) in (None, ()):
            raise UserError(f"--{key.replace('_', '-')} is missing: see {Path(sys.argv[0]).name} --help")
    if config.model.model not in PRESETS:
        raise UserError(f"--model {config.model.model}: {suggestion(config.model.model, PRESETS)}")
    values = config.flat()
    at_least_one = ("steps", "global_batch_size", "micro_batch_size", "layers", "heads", "width", "context")
    at_least_one += ("pipeline_stages",)
    at_least_one += ("spike_threshold", "spike_window", "max_bad_steps")
    not_negative = ("log_interval", "checkpoint_interval", "keep_checkpoints", "keep_every", "seed", "clip")
    not_negative += ("diagnose_interval",)
    not_negative += ("learning_rate", "min_learning_rate", "weight_decay", "hang_timeout")
    for key in at_least_one + not_negative:
        least = int(key in at_least_one)
        if values[key] is not None and not values[key] >= least:
            raise UserError(f"--{key.replace('_', '-')} {values[key]}: must be at least {least}")
    for key, value in values.items():
        if isinstance(value, int | float) and value > MOST:
            raise UserError(f"--{key.replace('_', '-')} {value}: must be at most {MOST:,}")
    for key in ("warmup_fraction", "decay_fraction", "dropout"):
        if not 0 <= values[key] <= 1:
            raise UserError(f"--{key.replace('_', '-')} {values[key]}: must be between 0 and 1")
    interval, every = config.interval.checkpoint_interval, config.interval.keep_every
    if interval and every % interval:
        raise UserError(f"--keep-every {every}: no multiple of --checkpoint-interval {interval}: choose one, or 0")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise UserError(f"--betas {config.optimizer.betas}: each must be at least 0 and below 1")
    if config.optimizer.min_learning_rate > config.optimizer.learning_rate:
        raise UserError(
            f"--min-learning-rate {values['min_learning_rate']} is above --learning-rate {values['learning_rate']}"
        )
    parse_entries(config.evaluation.eval)
    if parse_allowed(config.run.allow_other) and not config.run.resume:
        raise UserError(f"--allow-other {config.run.allow_other}: only a resume can have another: give --resume too")
    if config.run.resume not in (None, "auto") and config.run.init_from:
        raise UserError(
            "--resume PATH and --init-from exclude each other: resume restores the weights too; --resume auto takes "
            "--init-from until there is a checkpoint"
        )
