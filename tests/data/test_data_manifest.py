import hashlib
import json

import pytest

from megaresid.data.manifest import check_vocabulary, load_manifest
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
