"""Files of ``--eval-data`` and of the Hub: read as they are, or refused in one line that says where they are wrong."""

import copy
import gzip
import io
import json

import huggingface_hub
import pyarrow
import pytest
from eval_data import BYTES, PASSAGES, REAL, needs_real_data, small_data, write_jsonl
from hub_server import Fault, HubServer, send_library_to
from huggingface_hub import constants
from pyarrow import parquet

from megaresid.errors import UserError
from megaresid.evaluation import hub_data, texts
from megaresid.evaluation.data import FIELDS, FILES, find, read_rows, read_text
from megaresid.evaluation.perplexity import lambada, wikitext2
from megaresid.evaluation.texts import lambada_passages, wikitext2_rows

GOOD = {
    "arc_easy_test.jsonl": {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
    "hellaswag_val_processed.jsonl": {"query": "He", "choices": ["runs", "falls"], "gold": 1},
    "lambada_test.jsonl": {"text": "one two"},
    "piqa_valid.jsonl": {"goal": "do", "sol1": "this", "sol2": "that", "label": 0},
    "wikitext2_raw_test_pages.jsonl": {"page": " = A = \n"},
    "winogrande_xl_dev.jsonl": {"sentence": "a _ b", "option1": "x", "option2": "y", "answer": "2"},
}
# Of each file a field and values that it must not have.
BAD = {
    "arc_easy_test.jsonl": [
        ("question", ["", " ", None, 3, ["why"], "half \ud800"]),
        ("choices", [[], {}, {"text": ["a", "b"]}, {"text": ["a"], "label": ["A"]}]),
        ("choices", [{"text": ["a", "b"], "label": ["A", "A"]}, {"text": ["a", "b", "c"], "label": ["A", "B"]}]),
        ("choices", [{"text": ["a", 3], "label": ["A", "B"]}, {"text": ["a", "b"], "label": "AB"}]),
        ("answerKey", ["C", 1, None, ["A"]]),
    ],
    "hellaswag_val_processed.jsonl": [
        ("query", [""]),
        ("choices", [["runs"], "runs", ["runs", ""], [1, 2], None]),
        ("gold", [2, -1, "1", 1.0, True, None]),
    ],
    "lambada_test.jsonl": [("text", ["word", " word", "", "  ", "one\ntwo", None, 3, "a b\udfff", "long" * 99])],
    "piqa_valid.jsonl": [("goal", [""]), ("sol1", [None]), ("sol2", [0]), ("label", [2, "0", False, -1])],
    "wikitext2_raw_test_pages.jsonl": [("page", ["", 1])],
    "winogrande_xl_dev.jsonl": [
        ("sentence", ["no blank", "_ and _", None]),
        ("option1", [""]),
        ("option2", [2]),
        ("answer", [1, "3", "", None]),
    ],
}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_rows_are_read_as_they_are(tmp_path, name, ending):
    """With what else they have; blank lines are no rows."""
    rows = [GOOD[name] | {"also": n} for n in range(3)]
    path = write_jsonl(tmp_path / f"{name}{ending}", rows)
    data = gzip.decompress(path.read_bytes()) if ending else path.read_bytes()
    data = data.replace(b"\n", b"\n \n\n", 1).removesuffix(b"\n")
    path.write_bytes(gzip.compress(data) if ending else data)
    assert find(tmp_path, name) == path
    assert read_rows(path, FIELDS[name]) == rows


@pytest.mark.parametrize("name", FIELDS)
def test_a_row_that_is_not_as_it_must_be_is_told_by_line_and_field(tmp_path, name):
    cases = [(field, value) for field, values in BAD[name] for value in values]
    assert {field for field, _ in cases} == FIELDS[name].keys() == GOOD[name].keys()
    path = tmp_path / name
    for field, value in cases:
        write_jsonl(path, [GOOD[name], GOOD[name] | {field: value}])
        with pytest.raises(UserError, match=rf"^\S*{name}, line 2: '{field}' is .{{1,60}}; it must be [^\n]+$"):
            read_rows(path, FIELDS[name])
    for field in FIELDS[name]:
        row = copy.deepcopy(GOOD[name])
        del row[field]
        write_jsonl(path, [GOOD[name], GOOD[name], row])
        with pytest.raises(UserError, match=rf"{name}, line 3: no field '{field}'; it must be "):
            read_rows(path, FIELDS[name])


@pytest.mark.parametrize(
    "content, told",
    [
        (b'{"text": "a b"}\n{"text": "a b"\n', "line 2: not JSON"),
        (b'{"text": "a b"}\n\n["text"]\n', "line 3: not a JSON object; it must have text"),
        (b'{"text": "a b"}\n"text"\n', "line 2: not a JSON object"),
        (b'{"text": "a b"}\n{"text": "a \xff"}\n', "line 2: not UTF-8"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", "line 1: JSON nested too deep|line 1: not JSON"),
        (b"", "there is no row in it"),
        (b"\n \n", "there is no row in it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1: not JSON"),
    ],
)
def test_a_damaged_file_is_told_by_line(tmp_path, content, told):
    (tmp_path / "lambada_test.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"^{tmp_path}/lambada_test.jsonl(, |: )({told})[^\n]*$"):
        lambada(tmp_path, BYTES)


@pytest.mark.parametrize("cut", [5, -4, 0.5, "flipped", "plain"])
def test_a_damaged_gzip_file_is_refused(tmp_path, cut):
    """Cut in its head, its tail and its middle; a byte flipped; no gzip at all."""
    whole = gzip.compress(b"".join(b'{"text": "a b%d"}\n' % n for n in range(10_000)))
    damaged = {"flipped": whole[:500] + bytes([whole[500] ^ 255]) + whole[501:], "plain": b'{"text": "a b"}\n'}
    data = damaged[cut] if isinstance(cut, str) else whole[: int(len(whole) * cut) if isinstance(cut, float) else cut]
    (tmp_path / "lambada_test.jsonl.gz").write_bytes(data)
    with pytest.raises(UserError, match=r"lambada_test.jsonl.gz(: a damaged gzip file|, line \d+: not)"):
        lambada_passages(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_what_it_must_hold(tmp_path, name):
    (tmp_path / f"{name}.zip").touch()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"^--eval-data \S+: there is no {name} or {name}.gz in it; it must hold "):
        find(tmp_path, name)
    with pytest.raises(UserError, match=rf"^--eval-data \S+/none: no such folder; name the one that holds {name}"):
        find(tmp_path / "none", name)


def test_a_plain_file_comes_before_a_compressed_one(tmp_path):
    for name in ("lambada_test.jsonl", "lambada_test.jsonl.gz"):
        write_jsonl(tmp_path / name, [{"text": f"read {name}"}])
    assert lambada_passages(tmp_path) == ["read lambada_test.jsonl"]


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "there is no text in it"),
        (b" \n \n", "there is no text in it"),
        (b" \n = A = \n \n \xe9 \n", "line 4: not UTF-8"),
        (b" \r\n = A = \r\n", "line 1: a carriage return"),
        (b" \n = A = \n \n a\rb \n", "line 4: a carriage return"),
    ],
)
def test_a_damaged_text_is_refused(tmp_path, content, told):
    (tmp_path / "wikitext2_raw_test.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/wikitext2_raw_test.txt(, |: ){told}"):
        wikitext2(tmp_path, BYTES)


def test_an_unreadable_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no.txt: No such file or directory; give --eval-data files"):
        read_text(tmp_path / "no.txt")


@needs_real_data
@pytest.mark.parametrize("name", FIELDS)
def test_the_published_files_pass(name):
    """As many rows as their publishers count."""
    rows = {"arc": 2376, "hellaswag": 10042, "lambada": 5153, "piqa": 1838, "wikitext2": 62, "winogrande": 1267}
    assert len(read_rows(find(REAL, name), FIELDS[name])) == rows[name.split("_")[0]]


def as_on_the_hub(folder) -> dict[str, dict[str, bytes]]:
    """Of each data set its files: the small texts of ``eval_data`` in the Hub's form, other columns beside."""
    table = io.BytesIO()
    rows = wikitext2_rows(folder)
    parquet.write_table(pyarrow.table({"text": rows, "line": range(len(rows))}), table)
    passages = "".join(f"{json.dumps({'text': text})}\n" for text in PASSAGES).encode()
    return {
        "Salesforce/wikitext": {"wikitext-2-raw-v1/test-00000-of-00001.parquet": table.getvalue()},
        "EleutherAI/lambada_openai": {"data/lambada_test.jsonl": passages, "data/lambada_test_de.jsonl": b"{}"},
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with both data sets at the commits that are asked for, whose branches have gone on."""
    with HubServer() as server:
        files = as_on_the_hub(small_data(tmp_path))
        for name in ("WIKITEXT2_ON_HUB", "LAMBADA_ON_HUB"):
            file = getattr(texts, name)
            assert len(file.commit) == 40, "a commit, which does not change"
            commit = server.push(file.dataset, files[file.dataset])
            server.push(file.dataset, {file.name: b"other"})
            monkeypatch.setattr(texts, name, file._replace(commit=commit))
        send_library_to(server.url, tmp_path, monkeypatch)
        yield server
    huggingface_hub.close_session()


def test_the_hubs_texts_are_the_files_texts(hub, tmp_path, capsys):
    """Downloaded once, after a message."""
    assert wikitext2_rows(None) == wikitext2_rows(tmp_path)
    assert lambada_passages(None) == lambada_passages(tmp_path) == PASSAGES
    told = capsys.readouterr().err.splitlines()
    wikitext, passages = texts.WIKITEXT2_ON_HUB, texts.LAMBADA_ON_HUB
    assert told == [
        f"evaluation data: downloading Salesforce/wikitext, {wikitext.name} at {wikitext.commit[:12]} (0.7 MB) to "
        f"{constants.HF_HUB_CACHE}",
        f"evaluation data: downloading EleutherAI/lambada_openai, data/lambada_test.jsonl at {passages.commit[:12]} "
        f"(1.8 MB) to {constants.HF_HUB_CACHE}",
    ]
    before = len(hub.requests)
    assert lambada_passages(None) == PASSAGES
    assert len(hub.requests) == before and capsys.readouterr().err == "", "it is in the cache"


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_hub_that_refuses_is_told_in_one_line(hub, status, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults += [Fault(method, "/resolve/", status, times=99) for method in ("HEAD", "GET")]
    named = "^evaluation data: EleutherAI/lambada_openai, data/lambada_test.jsonl at "
    with pytest.raises(UserError, match=named) as told:
        lambada(None, BYTES)
    assert str(told.value).endswith("where the Hub cannot be reached, give a folder with the files by --eval-data")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("offline, cause", [(True, "OfflineModeIsEnabled"), (False, "ConnectError")])
def test_a_hub_that_cannot_be_reached_is_told_in_one_line(hub, offline, cause, monkeypatch, tmp_path):
    """Offline by the user's wish, or because nothing answers."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    send_library_to("http://127.0.0.1:9", tmp_path, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    told = rf"^evaluation data: Salesforce/wikitext, .* \({cause}: [^\n]*give a folder[^\n]*$"
    with pytest.raises(UserError, match=told):
        wikitext2(None, BYTES)


def test_a_damaged_download_is_refused(tmp_path, monkeypatch):
    """What is in the cache is no table, or one without the column."""
    path = tmp_path / "cached.parquet"
    monkeypatch.setattr(texts, "download", lambda file: path)
    path.write_bytes(b"PAR1 no table")
    with pytest.raises(UserError, match=f"^{path}: "):
        wikitext2_rows(None)
    parquet.write_table(pyarrow.table({"page": ["a"]}), path)
    with pytest.raises(UserError, match=f"^{path}: "):
        wikitext2_rows(None)


def test_the_file_asked_for_is_the_one_in_the_cache(hub):
    path = hub_data.download(texts.LAMBADA_ON_HUB)
    assert path.is_relative_to(constants.HF_HUB_CACHE) and texts.LAMBADA_ON_HUB.commit in path.parts
