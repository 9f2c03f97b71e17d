"""``python -m megaresid.doctor``: the data folder, the vocabulary and the Hub, with faults that are planted."""

import json
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from doctor_findings import levels, only

from data_prep import tokenizer
from data_prep.adopt import adopt
from megaresid.checks import data
from megaresid.data.shards import pack_header


def shard(ids: list[int]) -> bytes:
    return pack_header(len(ids)) + struct.pack(f"<{len(ids)}H", *ids)


@pytest.fixture
def data_set(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train_000000.bin").write_bytes(shard([50256, 1, 2, 3]))
    (folder / "val_000000.bin").write_bytes(shard([50256, 4]))
    adopt(folder)
    return folder


def change(folder: Path, edit) -> None:
    tree = json.loads((folder / "manifest.json").read_text())
    edit(tree["content"])
    (folder / "manifest.json").write_text(json.dumps(tree))


def test_a_sound_data_folder(data_set):
    for verify in (False, True):
        (found,) = data.data_folder(data_set, verify)
        assert found.level == "ok" and "4 train, 2 val tokens" in found.words


def test_a_corrupt_shard_is_found_by_its_bytes_when_asked(data_set):
    (data_set / "train_000000.bin").write_bytes(shard([50256, 1, 2, 4]))
    assert levels(data.data_folder(data_set, False)) == {"ok"}
    (found,) = data.data_folder(data_set, True)
    assert found.level == "fault" and "train_000000.bin: damaged" in found.words


def test_shards_that_are_cut_short_or_missing(data_set):
    (data_set / "train_000000.bin").write_bytes(shard([1, 2, 3, 4])[:-1])
    (data_set / "val_000000.bin").unlink()
    for verify in (False, True):
        short, missing = [f.words for f in data.data_folder(data_set, verify) if f.level == "fault"]
        assert "cut short" in short and "val_000000.bin: missing" in missing


def test_a_folder_that_is_no_data_set(tmp_path):
    assert "no such folder" in only(data.data_folder(tmp_path / "nowhere", False), "fault").words


def test_ids_outside_the_vocabulary_other_tokenizers_and_missing_splits(data_set):
    change(data_set, lambda content: content["shards"][0].update(largest_id=50257))
    assert "50257" in only(data.data_folder(data_set, False), "fault").words
    change(data_set, lambda content: content["shards"][0].update(largest_id=50256))
    change(data_set, lambda content: content["tokenizer"].update(name="own", sha256="0" * 64))
    assert "tokenized by own" in only(data.data_folder(data_set, False), "warning").words
    change(data_set, lambda content: content["tokenizer"].update(sha256=tokenizer.RANKS_SHA256))
    change(data_set, lambda content: (content["shards"].pop(), content["splits"].pop("val")))
    assert "no val shards" in only(data.data_folder(data_set, False), "warning").words


def test_a_vocabulary_that_is_missing_or_another(monkeypatch, tmp_path):
    monkeypatch.delenv(tokenizer.ENVIRONMENT, raising=False)
    monkeypatch.setattr(data, "installed_version", lambda name: None)
    monkeypatch.setattr(data, "gpt2_ranks", lambda: pytest.fail("it may ask the network"))
    assert "--network" in only(data.vocabulary(False), "warning").mend
    monkeypatch.setattr(data, "gpt2_ranks", lambda: {b"!": 0})
    assert levels(data.vocabulary(True)) == {"ok"}
    monkeypatch.undo()
    monkeypatch.setenv(tokenizer.ENVIRONMENT, str(tmp_path / "gone.tiktoken"))
    assert "gone.tiktoken" in only(data.vocabulary(False), "fault").words
    (tmp_path / "other.tiktoken").write_text("IQ== 0\n")
    monkeypatch.setenv(tokenizer.ENVIRONMENT, str(tmp_path / "other.tiktoken"))
    assert "not the GPT-2 vocabulary" in only(data.vocabulary(False), "fault").words


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(self.server.code)
        self.end_headers()

    def log_message(self, *given):
        pass


@contextmanager
def server(code: int):
    with HTTPServer(("127.0.0.1", 0), Answer) as serving:
        serving.code = code
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_a_hub_that_answers_and_one_that_does_not(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for code in (200, 403):
        with server(code) as place:
            monkeypatch.setenv("HF_ENDPOINT", place)
            assert levels(data.network()) == {"ok"}
    assert place in only(data.network(), "warning").words  # it has gone
    monkeypatch.setenv("HF_ENDPOINT", "no place")
    assert "no place" in only(data.network(), "warning").words
