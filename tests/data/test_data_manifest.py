import hashlib
import json

import pytest

from megaresid.data.manifest import Dropped, Manifest, check_vocabulary, load_manifest
from megaresid.errors import UserError


@pytest.fixture
def folder(tmp_path, write_data_set):
    return write_data_set(tmp_path / "set", {"train_000000.bin": [5, 700, 2], "val_000000.bin": [9]})


def edit(folder, change):
    path = folder / "manifest.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_reads_what_was_written(folder):
    manifest = load_manifest(folder)
    assert [shard.name for shard in manifest.shards("train")] == ["train_000000.bin"]
    assert manifest.shards("val")[0].tokens == 1
    assert manifest.content.tokenizer.end_of_text == 50256


def test_identity_is_the_hash_of_the_content_alone(folder):
    content = json.loads((folder / "manifest.json").read_text())["content"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    identity = load_manifest(folder).identity
    assert identity == hashlib.sha256(canonical).hexdigest()
    edit(folder, lambda tree: tree["provenance"].update(workers=7, created="2027-01-01T00:00:00+00:00"))
    assert load_manifest(folder).identity == identity
    edit(folder, lambda tree: tree["content"]["source"].update(revision="2"))
    assert load_manifest(folder).identity != identity


# The content of a data set as the first release wrote it, in the form that is hashed.
FIRST_RELEASE = (
    '{"dropped":{"empty":2},"options":{"shard_tokens":100000000,"validation_fraction":0.05},"runs_cut":1,"shards":['
    '{"bytes":1030,"largest_id":50256,"name":"train_000000.bin","sha256":"AAAA","split":"train","tokens":3}'
    '],"source":{"kind":"jsonl","revision":"sha256:00ff"},"split_rule":"by hash","splits":{"train":{"documents":2,'
    '"tokens":3},"val":{"documents":0,"tokens":0}},"tokenizer":{"end_of_text":50256,"name":"gpt2","sha256":"BBBB",'
    '"vocab_size":50257}}'
).replace("AAAA", "a1" * 32).replace("BBBB", "b2" * 32)
PROVENANCE = {"created": "2026", "inputs": ["x"], "text_column": "text", "workers": 2, "versions": {"python": "3.11"}}


def manifest_of(change=lambda content: None, provenance=PROVENANCE):
    content = json.loads(FIRST_RELEASE)
    change(content)
    return Manifest.model_validate_json(json.dumps({"schema": 1, "content": content, "provenance": provenance}))


def test_a_data_set_of_the_first_release_keeps_its_identity():
    manifest = manifest_of()
    assert manifest.identity == hashlib.sha256(FIRST_RELEASE.encode()).hexdigest()
    tree = {"schema": 1, "content": json.loads(FIRST_RELEASE), "provenance": PROVENANCE}
    assert manifest.model_dump(mode="json", by_alias=True) == tree


ADDED = [
    ("source", {"dataset": "HuggingFaceFW/fineweb", "config": "sample-10BT", "commit": "c0ffee"}),
    ("options", {"language": "en", "minimum_language_score": 0.65, "minimum_score": 3.0}),
    ("options", {"deduplicate": True, "limit_tokens": 10**10}),
    ("dropped", {"bad_rows": 1, "invalid_utf8": 2, "too_long": 3, "other_language": 4}),
    ("dropped", {"low_score": 5, "unreadable": 6, "duplicates": 7}),
]


@pytest.mark.parametrize("section, added", ADDED)
def test_what_was_added_is_part_of_the_identity_where_it_is_given(section, added):
    first = manifest_of()
    for key, value in added.items():
        manifest = manifest_of(lambda content, key=key, value=value: content[section].update({key: value}))
        assert manifest.model_dump(mode="json")["content"][section][key] == value
        assert manifest.identity != first.identity
        assert manifest_of(lambda content, key=key: content[section].update({key: None})).identity == first.identity
    assert manifest_of(lambda content: content.update(limited=True)).identity != first.identity


def test_shards_that_data_prep_did_not_make_have_no_options():
    manifest = manifest_of(lambda content: content.update(options={}), {"created": "2026", "versions": {}})
    assert manifest.model_dump(mode="json", by_alias=True)["content"]["options"] == {}
    assert manifest.model_dump(mode="json")["provenance"] == {"created": "2026", "inputs": [], "versions": {}}


def test_provenance_is_no_part_of_the_identity():
    files = {"count": 3, "bytes": 10, "sha256": "c" * 64}
    added = {"source_files": files, "partitions": 2, "tokenizer_backend": "tiktoken+gigatoken", "proven_bytes": 5}
    manifest = manifest_of(provenance=PROVENANCE | added)
    assert manifest.model_dump(mode="json")["provenance"] == PROVENANCE | added
    assert manifest.identity == manifest_of().identity


def test_only_what_was_left_out_is_counted():
    assert Dropped.of({"low_score": 0, "duplicates": 2}).model_dump() == {"empty": 0, "duplicates": 2}
    assert Dropped.of({"empty": 3}).model_dump() == {"empty": 3}
    with pytest.raises(ValueError, match="reason"):
        Dropped.of({"reason": 1})


def test_missing_folder_and_missing_manifest(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load_manifest(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: not a data set.*no manifest\.json"):
        load_manifest(tmp_path / "empty")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda tree: tree.update(schema=2), "schema"),
        (lambda tree: tree.update(extra=1), "extra"),
        (lambda tree: tree["content"].pop("tokenizer"), "content.tokenizer"),
        (lambda tree: tree["content"]["shards"].clear(), "content.shards"),
        (lambda tree: tree["content"]["shards"][0].update(tokens=4), "train_000000.bin"),
        (lambda tree: tree["content"]["shards"][0].update(sha256="xyz"), "sha256"),
        (lambda tree: tree["content"]["splits"]["train"].update(tokens=4), "split train has 4 tokens"),
        (lambda tree: tree["content"]["splits"].pop("val"), "no counts for split val"),
        (lambda tree: tree["content"]["shards"].append(tree["content"]["shards"][1]), "listed twice"),
    ],
)
def test_malformed_manifests_name_the_key(folder, change, says):
    edit(folder, change)
    with pytest.raises(UserError) as caught:
        load_manifest(folder)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_broken_json(folder):
    (folder / "manifest.json").write_text('{"schema": 1, ')
    with pytest.raises(UserError, match="manifest.json"):
        load_manifest(folder)


UNSAFE = ["../train_000000.bin", "sub/a.bin", "/etc/passwd", "..", ".", "", "a\\b", "a\n", ".x"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names(folder, name):
    edit(folder, lambda tree: tree["content"]["shards"][0].update(name=name))
    with pytest.raises(UserError, match="not a plain file name"):
        load_manifest(folder)


def test_links_may_not_leave_the_folder(folder, tmp_path):
    shard = folder / "train_000000.bin"
    outside = tmp_path / "outside.bin"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(UserError, match="train_000000.bin is a link out of the data folder"):
        load_manifest(folder)
    shard.unlink()
    outside.rename(folder / "inside.bin")
    shard.symlink_to("inside.bin")
    load_manifest(folder)


def test_check_vocabulary(folder):
    manifest = load_manifest(folder)
    check_vocabulary(manifest, 701)
    with pytest.raises(UserError, match=r"train_000000.bin: its largest token id 700 .* vocabulary of 700"):
        check_vocabulary(manifest, 700)
