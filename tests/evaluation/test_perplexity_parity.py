"""lm-evaluation-harness's own tasks, run by its own HFLM on the same weights, give the perplexities that we give."""

from pathlib import Path

import pytest
import torch
from eval_data import BYTES, REAL, needs_real_data, small_data, write_jsonl
from measurables import FullLogits, bytes_model
from small_models import model_of

from megaresid.evaluation.perplexity import lambada, wikitext2
from megaresid.evaluation.texts import lambada_passages, wikitext2_pages, wikitext2_rows
from megaresid.exchange.gpt2_config import config_of
from megaresid.exchange.gpt2_names import our_names, to_gpt2
from megaresid.model.gpt import GPT, canonical_parameters
from megaresid.model.presets import ModelShape

lm_eval = pytest.importorskip("lm_eval", exc_type=ImportError)
pytest.importorskip("accelerate", reason="HFLM needs it")


def task_of(name: str, file: str, rows: list[dict]):
    """The task as lm-evaluation-harness defines it, over these rows instead of the Hub's."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / file)
    for key in ("dataset_path", "dataset_name", "training_split", "validation_split", "metadata", "tag"):
        config.pop(key, None)
    return ConfigurableTask(config=config | {"custom_dataset": lambda: {"test": Dataset.from_list(rows)}})


def twin_of(model: GPT):
    """Hugging Face's GPT-2 with our weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    twin = GPT2LMHeadModel(GPT2Config(**config_of(model.shape))).to(next(model.parameters()).dtype)
    parameters = canonical_parameters(model, model.prefixes)
    ours = ((name, parameters[name].detach()) for name in our_names(model.shape))
    missing, unexpected = twin.load_state_dict(dict(to_gpt2(model.shape, ours)), strict=False)
    assert not unexpected and missing == ["lm_head.weight"]
    return twin.eval()


def by_hflm(twin, tokenizer, data: Path) -> dict[str, float]:
    """Its numbers under our names."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = {
        "wikitext": ("wikitext/wikitext.yaml", [{"page": page} for page in wikitext2_pages(wikitext2_rows(data))]),
        "lambada_openai": ("lambada/lambada_openai.yaml", [{"text": text} for text in lambada_passages(data)]),
    }
    found = evaluate(
        HFLM(pretrained=twin, tokenizer=tokenizer, device="cpu", batch_size=3),
        {name: task_of(name, *given) for name, given in tasks.items()},
        bootstrap_iters=0,
        log_samples=False,
    )["results"]
    wiki, words = found["wikitext"], found["lambada_openai"]
    return {
        "wikitext2/word_ppl": wiki["word_perplexity,none"],
        "wikitext2/byte_ppl": wiki["byte_perplexity,none"],
        "wikitext2/bits_per_byte": wiki["bits_per_byte,none"],
        "lambada/lastword_ppl": words["perplexity,none"],
        "lambada/lastword_acc": words["acc,none"],
    }


@torch.no_grad()
def by_token(twin, tokenizer, texts: list[str], first: list[int]) -> float:
    """Perplexity of the texts' tokens in one stream, ``first`` before each, in nanoGPT's windows of x and y; ``first``
    counts nothing in y."""
    ids = torch.tensor([token for text in texts for token in first + tokenizer(text)["input_ids"]])
    size, losses = twin.config.n_positions, []
    for start in range(0, len(ids) - 1, size):
        y = ids[start + 1 : start + 1 + size]
        nats = torch.nn.functional.cross_entropy(twin(ids[start : start + len(y)][None]).logits[0], y, reduction="none")
        losses.append(nats[~torch.isin(y, torch.tensor(first))])
    return torch.cat(losses).mean().exp().item()


def assert_parity(model: GPT, encoding, tokenizer, data: Path) -> dict[str, float]:
    engine, twin = FullLogits(model, 4 * model.shape.context), twin_of(model)
    ours = wikitext2(data, encoding)(engine) | lambada(data, encoding)(engine)
    theirs = by_hflm(twin, tokenizer, data) | {
        "wikitext2/token_ppl": by_token(twin, tokenizer, ["\n\n".join(wikitext2_rows(data))], []),
        "lambada/token_ppl": by_token(twin, tokenizer, lambada_passages(data), [tokenizer.eos_token_id]),
    }
    # HFLM adds up the log-probabilities of a window in fp32 whatever the model is in.
    assert ours == pytest.approx(theirs, rel=1e-6)
    return ours


def bytes_tokenizer():
    """``eval_data.BYTES`` as Hugging Face's tokenizers have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize("context", [8, 16, 64])
def test_small_texts(tmp_path, context):
    """Pages and passages that are cut many times, and hardly. HFLM refuses a last word longer than the context."""
    data = small_data(tmp_path)
    assert_parity(bytes_model(context), BYTES, bytes_tokenizer(), data)


def test_last_words_that_are_the_models_own_choice(tmp_path):
    """Each with one that differs in a letter: half are right. Found among random words, after which now and then
    the model expects a space, and then a letter."""
    data, model = small_data(tmp_path), bytes_model(64)
    engine = FullLogits(model, 64)
    letters = torch.tensor(list(b"abcdefgh "))
    drawn = letters[torch.randint(9, (1000, 40), generator=torch.Generator().manual_seed(0))]
    texts = []
    for row, place in (engine.logits(drawn).argmax(-1) == ord(" ")).nonzero().tolist():
        before = bytes(drawn[row, : place + 1].tolist()).decode()
        letter = chr(engine.logits(torch.tensor([list(f"{before} ".encode())]))[0, -1].argmax())
        if " " in before.strip() and before[-1] != " " and letter.isascii() and letter.isalpha():
            texts += [f"{before} {letter}", f"{before} {letter.swapcase()}"]
    assert len(texts) >= 4
    write_jsonl(data / "lambada_test.jsonl.gz", [{"text": text} for text in texts])
    assert assert_parity(model, BYTES, bytes_tokenizer(), data)["lambada/lastword_acc"] == 0.5


@pytest.mark.full
@needs_real_data
def test_a_slice_of_the_published_texts(tmp_path):
    """In GPT-2's tokens: an article and forty passages."""
    from transformers import GPT2TokenizerFast

    from data_prep.tokenizer import gpt2_encoding

    text = "\n".join(wikitext2_pages(wikitext2_rows(REAL))[:1])
    (tmp_path / "wikitext2_raw_test.txt").write_text(text, encoding="utf-8")
    write_jsonl(tmp_path / "lambada_test.jsonl", [{"text": text} for text in lambada_passages(REAL)[:40]])
    folder = REAL.parent / "gpt2_vocab"
    tokenizer = GPT2TokenizerFast(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    model = model_of("vanilla", ModelShape(layers=2, heads=2, width=16, context=64))
    assert_parity(model, gpt2_encoding(), tokenizer, tmp_path)
