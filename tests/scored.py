"""Scores of a model's texts of every length beside its own logits, one text at a time."""

import pytest
import torch

from megaresid.evaluation.loaded import LoadedModel
from megaresid.evaluation.scoring import Request, score
from megaresid.model.gpt import GPT


def assert_scores_every_length(model: GPT, tolerance: float) -> None:
    """Inputs of 1 token to the whole context, run in batches with padding behind, give what each gives alone."""
    model.eval()
    context, vocabulary = model.shape.context, model.shape.vocab_size
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary, (length + 1,), generator=generator) for length in range(1, context + 1)]
    requests = [Request(text[: (len(text) + 1) // 2].tolist(), text[(len(text) + 1) // 2 :].tolist()) for text in texts]
    dtype = next(model.parameters()).dtype
    for text, request, found in zip(
        texts, requests, score(LoadedModel(model, torch.device("cpu"), None, 3 * context), requests), strict=True
    ):
        with torch.no_grad():
            log_p = torch.log_softmax(model(text[None, :-1])[0][0].double(), -1)
        wanted = range(len(request.context), len(text))
        expected = sum(log_p[place - 1, text[place]].item() for place in wanted)
        assert found.log_probability == pytest.approx(expected, rel=tolerance, abs=tolerance), (len(text) - 1, dtype)
        assert found.greedy == all(log_p[place - 1].argmax() == text[place] for place in wanted)
