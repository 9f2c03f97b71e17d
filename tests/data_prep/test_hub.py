"""Data sets of the Hub: from a server on this machine, and from a copy of the repository."""

import io
import json
import random
import time
from pathlib import Path

import huggingface_hub
import pyarrow
import pytest
from hub_server import Fault, HubServer, blob_id, send_library_to
from huggingface_hub import constants
from jobs import data_set, expected_shards
from pyarrow import parquet

from data_prep import tokenizer
from data_prep.job import Job
from data_prep.pipeline import prepare
from data_prep.sources import grouping, hub_repository, open_source
from data_prep.sources import parquet as parquet_source
from data_prep.sources.hub_layout import matcher, patterns_of, select
from data_prep.sources.source import Share
from megaresid.errors import UserError

NAME = "HuggingFaceFW/fineweb"
CARD = b"""---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# FineWeb
"""
TEXTS = {f"sample/10BT/{n:03d}_00000.parquet": [f"Text {n}.{i} {'so ' * (i % 9)}" for i in range(40)] for n in range(4)}
DOCUMENTS = [text for name in sorted(TEXTS) for text in TEXTS[name]]


def fineweb_table(texts: list[str]) -> bytes:
    """Rows of FineWeb's schema, 10 in a row group."""
    n = len(texts)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{i}>" for i in range(n)],
        "dump": ["CC-MAIN-2013-20"] * n,
        "url": [f"http://example.com/{i}" for i in range(n)],
        "date": ["2013-05-18T07:24:47Z"] * n,
        "file_path": ["s3://commoncrawl/crawl-data/x.warc.gz"] * n,
        "language": ["en"] * n,
        "language_score": pyarrow.array([0.9] * n, pyarrow.float64()),
        "token_count": pyarrow.array([len(text) // 4 for text in texts], pyarrow.int64()),
    }
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file, row_group_size=10)
    return file.getvalue()


FILES = {
    "README.md": CARD,
    ".gitattributes": b"*.parquet filter=lfs",
    "data/CC-MAIN-2013-20/000_00000.parquet": fineweb_table(["of another configuration"]),
    **{name: fineweb_table(texts) for name, texts in TEXTS.items()},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with FineWeb on it, an empty cache, and waits that are noted in ``hub.waits`` and take no time."""
    with HubServer() as server:
        server.push(NAME, FILES)
        send_library_to(server.url, tmp_path, monkeypatch)
        # Small files must be large enough to be cut, and to break off in the middle of.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
        for module in (grouping, parquet_source):
            monkeypatch.setattr(module, "UNIT_BYTES", 200)
        server.waits = []
        monkeypatch.setattr(time, "sleep", server.waits.append)
        yield server
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def ranks():
    return tokenizer.gpt2_ranks(None)


@pytest.fixture(autouse=True)
def vocabulary(ranks, monkeypatch):
    """The vocabulary is loaded once for all tests."""
    monkeypatch.setattr("data_prep.worker.gpt2_ranks", lambda vocab_file: ranks)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the repository in a folder."""
    for name, data in FILES.items():
        path = tmp_path / "copy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "copy"


def job(out="unused", **options) -> Job:
    defaults = dict(source="fineweb", workers=1, shard_tokens=100, validation_fraction=0.2)
    return Job(out=Path(out), tokenizer_backend="tiktoken", **defaults | options)


def downloads(hub) -> list[str]:
    """The files of which the server was asked for the content."""
    paths = [request.split("/resolve/")[1:] for request in hub.requests if request.startswith("GET")]
    return [path[0].split("/", 1)[1] for path in paths if path]


def test_hub_and_copy_make_the_same_by_definition(hub, copy, tmp_path):
    prepare(job(tmp_path / "downloaded"))
    shards, content = data_set(tmp_path / "downloaded")
    assert shards == expected_shards(DOCUMENTS)
    commit = hub.repositories[NAME]["main"]
    named = {"kind": "fineweb", "dataset": NAME, "config": "sample-10BT"}
    assert content["source"].items() >= (named | {"commit": commit}).items()
    assert sorted(downloads(hub)) == ["README.md", *TEXTS], "and no other configuration"
    assert {name: hub.sent[name] for name in TEXTS} == {name: len(FILES[name]) for name in TEXTS}
    before = len(hub.requests)
    prepare(job(tmp_path / "read", input=(str(copy),)))
    assert len(hub.requests) == before, "a copy needs no network"
    read, described = data_set(tmp_path / "read")
    assert read == shards and "commit" not in described["source"]
    assert described["source"] | {"commit": commit} == content["source"]


def test_listing_names_files_sizes_and_blobs(hub):
    source = open_source(job())
    expected = [(name, len(FILES[name]), blob_id(FILES[name])) for name in sorted(TEXTS)]
    assert [(file.name, file.bytes, file.stamp) for file in source.files] == expected
    assert source.bytes == source.download_bytes() == sum(len(FILES[name]) for name in TEXTS)
    pages = [request for request in hub.requests if "/tree/" in request]
    assert len(pages) > 2 and downloads(hub) == ["README.md"]


def test_cached_files_and_listings_are_not_asked_for_again(hub):
    list(open_source(job()).units())
    sent, before = dict(hub.sent), len(hub.requests)
    again = open_source(job())
    assert again.download_bytes() == 0 and len(list(again.units())) == 4 * 4
    assert hub.sent == sent and not [request for request in hub.requests[before:] if "/revision/" not in request]


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; run once without it, or give a copy with --input"):
        open_source(job())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online = open_source(job())
    next(online.units())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline, before = open_source(job()), len(hub.requests)
    assert offline.files == online.files and offline.describe("0") == online.describe("0")
    with pytest.raises(UserError, match="001_00000.parquet: not in the cache, and HF_HUB_OFFLINE is set"):
        list(offline.units())
    assert len(hub.requests) == before
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    units = list(online.units())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert list(open_source(job()).units()) == units
    assert len(hub.requests) == before


def test_offline_without_a_card(hub, monkeypatch):
    hub.push(NAME, {name: FILES[name] for name in TEXTS})
    units = list(open_source(job()).units())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert list(open_source(job()).units()) == units and len(units) == 16


def test_a_broken_download_goes_on_where_it_broke(hub, tmp_path):
    broken = sorted(TEXTS)[1]
    hub.faults += [Fault("GET", broken, break_after=1250), Fault("GET", broken, break_after=730)]
    prepare(job(tmp_path / "out"))
    assert data_set(tmp_path / "out")[0] == expected_shards(DOCUMENTS)
    # The library keeps what came in whole chunks (of 100 bytes here).
    assert hub.ranges == ["bytes=1200-", "bytes=1900-"]
    assert hub.sent[broken] == 1250 + 730 + len(FILES[broken]) - 1900
    assert downloads(hub).count(broken) == 3


@pytest.mark.parametrize(
    "part, headers, seconds",
    [
        ("/revision/", {"Retry-After": "7"}, 7),
        ("/revision/", {"RateLimit": '"api";r=0;t=55'}, 55),
        ("/revision/", {}, 2),
    ],
)
def test_a_rate_limit_is_waited_out_with_a_message(hub, capfd, part, headers, seconds):
    hub.faults.append(Fault("GET", part, status=429, headers=headers))
    assert len(open_source(job()).files) == 4
    assert hub.waits == [seconds]
    said = f"revision main: the Hub's rate limit is reached (a token raises it); trying again in {seconds} s (1 of 7)"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("method, part", [("GET", "/tree/"), ("HEAD", "/001_00000"), ("GET", "/001_00000")])
def test_rate_limits_that_outlast_the_library(hub, capfd, method, part):
    hub.faults.append(Fault(method, part, status=429, headers={"Retry-After": "3"}, times=8))
    assert len(list(open_source(job()).units())) == 16
    assert hub.faults[0].times == 0
    # The library's own waits are a second longer than it is asked for.
    assert 3 in hub.waits and set(hub.waits) <= {3, 4} and "trying again in 3 s (1 of 7)" in capfd.readouterr().err


def test_a_server_that_stays_down_is_given_up(hub, capfd):
    hub.faults.append(Fault("GET", "/revision/", status=503, times=1000))
    with pytest.raises(UserError, match=r"503 .* 8 times; --resume goes on with the job when the Hub answers again"):
        open_source(job())
    assert hub.waits == [2, 4, 8, 16, 32, 64, 120]
    assert "(7 of 7)" in capfd.readouterr().err


def test_a_connection_that_cannot_be_made_is_tried_again(hub, monkeypatch, capfd):
    api = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(hub_repository.huggingface_hub, "HfApi", lambda: api)
    with pytest.raises(UserError, match="8 times; --resume goes on"):
        open_source(job())
    assert len(hub.waits) >= 7


@pytest.mark.parametrize(
    "status, headers, message",
    [
        (401, {"X-Error-Code": "RepoNotFound"}, f"--dataset {NAME}: not at .*/{NAME}; check the name; if it is"),
        (401, {}, r"access refused \(401\); log in \(hf auth login\) or set HF_TOKEN that may read"),
        (403, {}, r"access refused \(403\)"),
        (403, {"X-Error-Code": "GatedRepo"}, f"gated; accept its terms at .*/datasets/{NAME}, then log in"),
        (404, {"X-Error-Code": "RevisionNotFound"}, f"--revision main: no such branch, tag or commit of {NAME}"),
        (400, {}, "Bad request"),
    ],
)
def test_refusals_are_not_tried_again(hub, status, headers, message):
    hub.faults.append(Fault("GET", "/revision/", status=status, headers=headers))
    with pytest.raises(UserError, match=message):
        open_source(job())
    assert hub.waits == []


def test_a_file_that_is_gated_or_gone(hub):
    hub.faults.append(Fault("HEAD", "000_00000.parquet", status=403, headers={"X-Error-Code": "GatedRepo"}))
    with pytest.raises(UserError, match="gated; accept its terms"):
        list(open_source(job()).units())
    source = open_source(job())
    del hub.commits[source.repository.commit][sorted(TEXTS)[0]]
    with pytest.raises(UserError, match="000_00000.parquet: no longer at"):
        list(source.units())
    assert hub.waits == []


def test_the_token_is_sent(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    next(open_source(job()).units())
    assert set(hub.tokens[-3:]) == {"Bearer hf_secret"}


def test_a_moved_branch_is_refused_and_the_commit_goes_on(hub, tmp_path, monkeypatch):
    before = hub.repositories[NAME]["main"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.pipeline.manifest_of", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(job(tmp_path / "out"))
    moved = hub.push(NAME, FILES | {sorted(TEXTS)[0]: fineweb_table(["newer"])})
    with pytest.raises(UserError, match=f"the source's commit is {moved}, and was {before}"):
        prepare(job(tmp_path / "out", resume=True))
    prepare(job(tmp_path / "out", resume=True, revision=before))
    assert data_set(tmp_path / "out")[0] == expected_shards(DOCUMENTS)


def test_a_branch_that_moved_before_the_hub_stopped_answering_is_not_taken_for_what_it_was(hub, capfd):
    open_source(job())
    moved = hub.push(NAME, FILES | {sorted(TEXTS)[0]: fineweb_table(["newer"])})
    # Then the library would give the commit that it has in its cache.
    hub.faults.append(Fault("GET", "/revision/", status=500, passed=1))
    assert open_source(job()).repository.commit == moved
    assert "trying again in 2 s (1 of 7)" in capfd.readouterr().err


def test_what_was_listed_is_read_whatever_becomes_of_the_branch(hub):
    source = open_source(job())
    hub.push(NAME, FILES | {name: fineweb_table(["newer"]) for name in TEXTS})
    units = list(source.units())
    assert all(Path(unit.segments[0].path).read_bytes() == FILES[unit.segments[0].name] for unit in units)
    assert {unit.segments[0].name for unit in units} == set(TEXTS)


def test_shares_download_their_own_files(hub):
    """By definition: a share's units are those that begin in its part of the source's bytes."""
    total = sum(len(FILES[name]) for name in TEXTS)
    starts = {name: sum(len(FILES[other]) for other in TEXTS if other < name) for name in TEXTS}
    whole = [unit.name for unit in open_source(job(input=())).units()]
    cache, shares = Path(constants.HF_HUB_CACHE), []
    for number in (1, 2, 3):
        hub.requests.clear()
        constants.HF_HUB_CACHE = str(cache.with_name(f"cache{number}"))
        source = open_source(job())
        first, last = total * (number - 1) / 3, total * number / 3
        meeting = [name for name in sorted(TEXTS) if starts[name] < last and starts[name] + len(FILES[name]) > first]
        assert source.download_bytes(Share(number, 3)) == sum(len(FILES[name]) for name in meeting)
        shares += [unit.name for unit in source.units(Share(number, 3))]
        assert sorted(downloads(hub)) == ["README.md", *meeting]
    assert shares == whole


def test_one_look_downloads_one_file_and_going_on_the_next_two(hub, monkeypatch):
    source = open_source(job())
    units = source.units()
    next(units)
    assert list(source._downloads) == sorted(TEXTS)[:1]
    next(units)
    assert list(source._downloads) == sorted(TEXTS)[:3]
    list(units)
    assert [downloads(hub).count(name) for name in sorted(TEXTS)] == [1, 1, 1, 1]


def test_fineweb_without_its_card(copy):
    (copy / "README.md").unlink()
    names = {"sample-10BT": sorted(TEXTS), "default": ["data/CC-MAIN-2013-20/000_00000.parquet"]}
    names["CC-MAIN-2013-20"] = names["default"]
    for config, expected in names.items():
        source = open_source(job(input=(str(copy),), dataset_config=config))
        assert [file.name for file in source.files] == expected
    with pytest.raises(UserError, match="--dataset-config CC-MAIN-2099-01: no parquet or jsonl files"):
        open_source(job(input=(str(copy),), dataset_config="CC-MAIN-2099-01"))


def test_hidden_files_and_broken_links_of_a_copy(copy):
    cache = copy / ".cache" / "sample/10BT/9.parquet"
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"of a download tool")
    (copy / "sample/10BT/.5.parquet").write_bytes(b"in the middle of being copied")
    assert [file.name for file in open_source(job(input=(str(copy),))).files] == sorted(TEXTS)
    (copy / "sample/10BT/4.parquet").symlink_to("nothing")
    with pytest.raises(UserError, match="4.parquet: No such file or directory; get a whole copy"):
        open_source(job(input=(str(copy),)))


def test_mistakes_in_options(copy, tmp_path):
    with pytest.raises(UserError, match="--dataset: --source hub needs the data set's name, ORG/NAME"):
        open_source(job(source="hub"))
    with pytest.raises(UserError, match=r"--dataset a/b/c: not a name on the Hub; it is like ORG/NAME"):
        open_source(job(source="hub", dataset="a/b/c"))
    with pytest.raises(UserError, match="reads one folder, a copy of the repository"):
        open_source(job(input=(str(copy), str(copy))))
    with pytest.raises(UserError, match="--input .*gone: no such folder"):
        open_source(job(input=(str(tmp_path / "gone"),)))
    with pytest.raises(UserError, match="--dataset-config sample-9BT: no such .*; there are default, sample-10BT"):
        open_source(job(input=(str(copy),), dataset_config="sample-9BT"))


def test_lines_of_json(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"body": "some text"}) + "\n")
    source = open_source(job(source="hub", input=(str(tmp_path),), text_column="body"))
    (unit,) = source.units()
    assert [batch.documents for batch in source.reader.read(unit, {})] == [[b"some text"]]


@pytest.mark.parametrize(
    "names, config, expected",
    [
        (["data/train-0.parquet", "data/test-0.parquet", "x.parquet"], None, ["data/train-0.parquet"]),
        (["b.parquet", "a.parquet", "README.md"], None, ["a.parquet", "b.parquet"]),
        (["en/0.jsonl.gz", "de/0.jsonl.gz"], "de", ["de/0.jsonl.gz"]),
        (["data/en/0.parquet", "data/de/0.parquet"], "en", ["data/en/0.parquet"]),
        (["default/train/0000.parquet", "default/validation/0000.parquet"], None, ["default/train/0000.parquet"]),
        (["part-0.parquet", "part-1.parquet", "validation.parquet"], None, ["part-0.parquet", "part-1.parquet"]),
        (["train-0.parquet", "extra.parquet", "dev.parquet"], None, ["train-0.parquet"]),
        (["constraint/a.parquet", "contest/b.parquet"], None, ["constraint/a.parquet", "contest/b.parquet"]),
        (["a.jsonl", "b.parquet", "c.parquet"], None, ["b.parquet", "c.parquet"]),
    ],
)
def test_usual_layouts(names, config, expected):
    shuffled = random.Random(7).sample(names, len(names))
    assert select(shuffled, None, config)[1] == expected


def test_usual_layouts_refused():
    with pytest.raises(UserError, match="--dataset-config fr: no such folder in the data set; there are de, en"):
        select(["en/0.parquet", "data/de/0.parquet"], None, "fr")
    with pytest.raises(UserError, match="try --revision refs/convert/parquet"):
        select(["data.csv", "script.py"], None, None)


@pytest.mark.parametrize(
    "configs, expected",
    [
        ("{config_name: a, data_files: 'x/*.parquet'}", {"a": ["x/*.parquet"]}),
        ("{data_files: x}", {"default": ["x"]}),
        ("{config_name: a, data_files: [x.parquet, y.parquet]}", {"a": ["x.parquet", "y.parquet"]}),
        ("{config_name: a, data_dir: d, data_files: [{split: train, path: [x, y]}, {split: test, path: z}]}",
         {"a": ["d/x", "d/y"]}),
        ("{config_name: a, data_files: {train: x, validation: y}}", {"a": ["x"]}),
        ("{config_name: a, data_dir: d}", {"a": ["d/**"]}),
        ("{config_name: b, data_files: y}\n- {config_name: a, default: true, data_files: x}", {"b": ["y"], "a": ["x"]}),
        ("{config_name: default, data_files: y}\n- {config_name: a, data_files: x}", {"default": ["y"], "a": ["x"]}),
    ],
)  # fmt: skip
def test_configurations_of_a_card(configs, expected):
    patterns, default = patterns_of(f"---\nconfigs:\n- {configs}\n---\n# A card\n")
    assert patterns == expected and default == ("default" if "default" in expected else "a")


def test_cards_without_configurations():
    for card in (None, "", "# A card\n", "---\nlicense: mit\n---\n", "---\n---\n"):
        assert patterns_of(card) == ({}, None)
    with pytest.raises(UserError, match="README.md: the data set's card cannot be read"):
        patterns_of("---\nconfigs: [\n---\n")


def test_which_configuration_is_meant():
    several = "---\nconfigs:\n- {config_name: a, data_files: a/*}\n- {config_name: b, data_files: b/*}\n---\n"
    names = ["a/0.parquet", "b/0.parquet"]
    with pytest.raises(UserError, match="--dataset-config: the data set has several, name one of a, b"):
        select(names, several, None)
    assert select(names, several, "b") == ("parquet", ["b/0.parquet"])
    assert select(names, several.replace("b, data", "b, default: true, data"), None)[1] == ["b/0.parquet"]
    folder = "---\nconfigs:\n- {config_name: a, data_dir: a}\n---\n"
    assert select(["a/train.parquet", "a/test.parquet", "train.parquet"], folder, None)[1] == ["a/train.parquet"]


@pytest.mark.parametrize(
    "pattern, matching, other",
    [
        ("data/*/*", ["data/a/b.parquet"], ["data/a.parquet", "data/a/b/c.parquet", "x/data/a/b"]),
        ("data/**", ["data/a", "data/a/b"], ["database/a"]),
        ("**/*.parquet", ["a.parquet", "x/y/a.parquet"], ["a.parquet.txt", "aXparquet"]),
        ("train-?[0-4].parquet", ["train-x3.parquet"], ["train-x5.parquet", "train-/3.parquet"]),
        ("sample", ["sample/a.parquet", "sample/x/a.parquet"], ["samples/a.parquet"]),
    ],
)
def test_patterns(pattern, matching, other):
    assert all(matcher(pattern).fullmatch(name) for name in matching)
    assert not any(matcher(pattern).fullmatch(name) for name in other)
