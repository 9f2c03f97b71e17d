"""GPT-2's tokenizer files, made of the ranks of its tokens."""

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from data_prep.tokenizer import encoding_of, gpt2_ranks
from megaresid.exchange.tokenizer_files import merges_text, vocabulary_text, write_tokenizer

# The files published with GPT-2, whose hashes tiktoken expects.
ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_files_are_those_published_with_gpt2():
    ranks = gpt2_ranks()
    assert sha256(vocabulary_text(ranks)) == ENCODER_JSON
    assert sha256(merges_text(ranks)) == VOCAB_BPE


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, gpt2_ranks(), context=77)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def encoding():
    return encoding_of(gpt2_ranks())


def test_transformers_reads_them(tokenizer):
    assert tokenizer.model_max_length == 77 and len(tokenizer) == 50257
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.unk_token_id == 50256
    assert tokenizer("Hello, world!")["input_ids"] == [15496, 11, 995, 0]
    assert tokenizer("a<|endoftext|>b")["input_ids"] == [64, 50256, 65]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_it_encodes_and_decodes_as_tiktoken(tokenizer, encoding, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == encoding.encode(text, allowed_special="all")
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
