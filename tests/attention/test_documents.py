"""Documents kept apart and positions, in whole models: each document as if it were alone."""

import functools
from contextlib import ExitStack, contextmanager
from unittest import mock

import courses
import pytest
import small_models
import torch
from compiled import assert_compiles_to_one_graph
from courses import assert_same_course, mean_over_ranks, train_in_two_stages, train_under_zero
from small_models import Case, gradients_of, loss_of, move_away

from megaresid.attention.softmax import Softmax
from megaresid.config import parse
from megaresid.errors import UserError
from megaresid.model.gpt import GPT, build, canonical_parameters
from megaresid.model.plan import ModelPlan
from megaresid.model.presets import ModelShape

SHAPE = ModelShape(layers=3, heads=2, width=16, context=40, vocab_size=8, end_of_text=0)
IDX = torch.randint(SHAPE.vocab_size, (2, 41), generator=torch.Generator().manual_seed(1))
MODELS = {
    "hybrid": ("softmax(positions=rope) + gated_delta_net + gla", "vanilla"),
    "window": ("softmax(positions=none, window=5)", "vanilla"),
    "values of the first layer": ("value_residual(positions=rope, qk_norm=true)", "vanilla"),
    "blend": ("blend(gla, causal_conv) + delta_net", "hyper_connections"),
    "three inputs": ("kda + softmax(positions=rope)", "mudd_former"),
}
HYBRID = MODELS["hybrid"]
QUICKLY = [
    pytest.param(*model, id=name, marks=[] if name in ("hybrid", "values of the first layer") else [pytest.mark.full])
    for name, model in MODELS.items()
]


def model_of(attention: str, residual: str, documents: bool, recompute: bool = False) -> GPT:
    """In fp64, away from initialisation; equal parameters whether documents are kept apart or not."""
    plan = ModelPlan(SHAPE, attention, residual, documents=documents)
    assert not plan.has_positions
    model = build(plan, seed=0, activation_checkpointing=recompute).double()
    move_away(canonical_parameters(model, model.prefixes), 0.2, SHAPE.vocab_size)
    return model


def documents_of(line: torch.Tensor) -> list[slice]:
    """Where each document of a line of tokens lies: a new one begins at every <|endoftext|>."""
    starts = [t for t in range(len(line)) if t == 0 or line[t] == SHAPE.end_of_text]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(line)])]


def one_by_one(model: GPT) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and loss of IDX from calls with one document each."""
    logits, total = [], 0
    for line in IDX:
        of_line = []
        for where in documents_of(line[:-1]):
            alone, targets = line[:-1][None, where], line[1:][None, where]
            of_line.append(model(alone)[0][0])
            total = total + model(alone, targets)[1] * targets.numel()
        logits.append(torch.cat(of_line))
    return torch.stack(logits), total / IDX[:, 1:].numel()


def test_the_tokens_have_documents_of_many_lengths():
    lengths = {where.stop - where.start for line in IDX for where in documents_of(line[:-1])}
    assert min(lengths) <= 2 and max(lengths) >= 10 and len(lengths) >= 5


@pytest.mark.parametrize(("attention", "residual"), MODELS.values(), ids=MODELS)
def test_logits_and_gradients_are_those_of_each_document_by_itself(attention, residual):
    together, alone = (model_of(attention, residual, documents) for documents in (True, False))
    expected_logits, expected = one_by_one(alone)
    logits, loss = together(IDX[:, :-1])[0], loss_of(together, IDX)
    assert (logits - expected_logits).abs().max() < 1e-10 * expected_logits.abs().max()
    assert (alone(IDX[:, :-1])[0] - expected_logits).abs().max() > 1e-3, "documents are of no matter here"
    assert abs(loss - expected) < 1e-12 * expected
    found, wanted = gradients_of(together, loss), gradients_of(alone, expected)
    scale = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-10 * max(gradient.norm(), 1e-4 * scale), name


@pytest.mark.parametrize(("attention", "residual"), QUICKLY)
def test_recomputation_changes_no_bit(attention, residual):
    models = [model_of(attention, residual, True, recompute) for recompute in (False, True)]
    losses = [loss_of(model, IDX) for model in models]
    assert torch.equal(*losses)
    gradients, again = (gradients_of(model, loss) for model, loss in zip(models, losses))
    assert all(torch.equal(gradient, again[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize(("attention", "residual"), QUICKLY)
def test_a_text_token_by_token_is_the_text_at_once(attention, residual):
    model = model_of(attention, residual, True)
    with torch.inference_mode():
        whole, cache = model(IDX)[0], model.init_cache(41)
        pieces = torch.cat([model(piece, cache=cache)[0] for piece in IDX.split([7] + [1] * 34, 1)], 1)
    assert (pieces - whole).abs().max() < 1e-10 * whole.abs().max()


@pytest.mark.parametrize(
    "attention", ["softmax(positions=rope, window=5) + delta_net", pytest.param(HYBRID[0], marks=pytest.mark.full)]
)
def test_the_whole_model_is_one_graph(attention):
    assert_compiles_to_one_graph(model_of(attention, "vanilla", True), 1e-9, IDX[:, :23], backend="eager")


@contextmanager
def kept_apart():
    """The small trainings of ``courses`` with documents: one token in five begins one."""
    shape = small_models.SHAPE.model_copy(update={"vocab_size": 5, "end_of_text": 0})
    plan = functools.partial(ModelPlan, documents=True)
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(courses, "SHAPE", shape))
        for module in (courses, small_models):
            patches.enter_context(mock.patch.object(module, "ModelPlan", plan))
        yield


def under_zero(case: Case, stage: int, folder: str):
    with kept_apart():
        return train_under_zero(case, stage, folder)


def in_two_stages(case: Case, cut: int):
    with kept_apart():
        return train_in_two_stages(case, cut)


def case_of(attention: str) -> Case:
    return Case("vanilla", attention, layers=3, step=0)


def assert_the_course_of_a_plain_loop(found, case: Case) -> None:
    with kept_apart():
        courses.plain_course.cache_clear()
        assert_same_course(found, case)
        kept = courses.plain_course(case)
        courses.plain_course.cache_clear()
    with mock.patch.object(courses, "SHAPE", small_models.SHAPE.model_copy(update={"vocab_size": 5})):
        assert abs(courses.plain_course(case)[0][0] - kept[0][0]) > 1e-4, "documents are of no matter here"
        courses.plain_course.cache_clear()


@pytest.mark.parametrize("cut", [3, pytest.param(4, marks=pytest.mark.full)])
def test_segments_cross_the_boundary_of_pipeline_stages(cut, ranks2):
    """An int32 beside the stream's floats."""
    case = case_of(HYBRID[0])
    first, second = ranks2.run(in_two_stages, case, cut)
    assert first == second
    assert_the_course_of_a_plain_loop(first, case)


@pytest.mark.full
def test_zero_3_keeps_documents_apart(ranks2, tmp_path):
    case = case_of(HYBRID[0])
    assert_the_course_of_a_plain_loop(mean_over_ranks(*ranks2.run(under_zero, case, 3, str(tmp_path))), case)


def plan_of(options: str) -> ModelPlan:
    needed = "--data data --run-dir run --deepspeed_config ds.json --model tiny"
    return parse([*needed.split(), *options.split()]).plan()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "learned, for softmax in 4 of 4 layers"),
        ("--attention 3*gla+softmax", "learned, for softmax in 1 of 4 layers"),
        ("--attention gla", "none, for no mixer needs them"),
        ("--attention gla+softmax(positions=rope)", "none, for no mixer needs them"),
        ("--attention gla --positions learned", "learned, as asked"),
        (
            "--attention gla+softmax --positions none",
            "none, as asked, though softmax in 2 of 4 layers cannot tell the order of tokens without",
        ),
        ("--attention gla --separate-documents", "none, for no mixer needs them; documents kept apart"),
    ],
)
def test_a_model_says_what_it_chose(options, words):
    plan = plan_of(options)
    assert plan.describe_positions() == words
    assert plan.has_positions == words.startswith("learned")
    with torch.device("meta"):
        model = GPT(plan)
    assert ("embed.positions.weight" in canonical_parameters(model, model.prefixes)) == plan.has_positions


def test_positions_and_documents_are_part_of_a_runs_identity():
    others = (plan_of(f"--attention gla {asked}").hash for asked in ("--positions learned", "--separate-documents"))
    plain = plan_of("--attention gla").hash
    assert len({plain, *others}) == 3
    assert plan_of("--attention gla --positions none").hash == plain


class Unaware(Softmax):
    reads = ()


def test_a_mixer_that_cannot_keep_documents_apart_is_refused():
    with pytest.raises(UserError, match="layer 1: attention 'test_documents:Unaware' cannot keep documents apart"):
        ModelPlan(SHAPE, "gla + test_documents:Unaware", documents=True)
    ModelPlan(SHAPE, "gla + test_documents:Unaware")
    with pytest.raises(UserError, match="id 50256, which a vocabulary of 8 has not: turn it off"):
        ModelPlan(SHAPE.model_copy(update={"end_of_text": 50256}), "gla", documents=True)
