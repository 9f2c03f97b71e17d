import json
import shutil
from collections import namedtuple

import pytest
from parts_by_hand import expected, parts_of, read_shards, write_part

from data_prep import merge as merging
from data_prep import writer
from data_prep.merge import merge
from data_prep.plan import DOCUMENTS_SHA256, Cutting, Plan, PlannedFile, PlannedShare, Reading, write_plan, write_share
from data_prep.workplace import alone_in
from megaresid.data.manifest import load_manifest
from megaresid.errors import UserError

DOCUMENTS = [(b"text %d" % n, [n, *range(n % 5)]) for n in range(60)] + [(b"text 3", [3, 0, 1, 2])]
LENGTHS = [10, 0, 15, 5, 20, 11]
CUT = dict(shard_tokens=50, validation_fraction=0.3, deduplicate=True, limit_tokens=None)


def plan_of(number, of, **changes):
    reading = dict(source="jsonl", text_column="text", minimum_score=3.0)
    fields = dict(
        format=1,
        unit_bytes=100,
        most_bytes=1000,
        tokenizer_sha256="e" * 64,
        source={"kind": "jsonl", "revision": f"sha256:{DOCUMENTS_SHA256}"},
        inputs=(f"/machine{number}",),
        reading=Reading(**reading | changes.pop("reading", {})),
        cutting=Cutting(**CUT | changes.pop("cutting", {})),
        share=PlannedShare(number=number, of=of),
        files=(
            PlannedFile(name="a", bytes=350, stamp=f"{number}1"),
            PlannedFile(name="b", bytes=250, stamp=f"{number}2"),
        ),
    )
    return Plan(**fields | changes)


def write_share_of(folder, number, of, parts, **changes):
    plan = plan_of(number, of, **changes)
    (folder / "parts").mkdir(parents=True)
    for part in parts:
        write_part(folder / "parts", part, plan.sha256)
    write_plan(folder / "parts", plan)
    write_share(folder / "parts", plan, [part.name for part in parts])
    return folder


@pytest.fixture
def parts():
    made = parts_of(DOCUMENTS, LENGTHS, backend="gigatoken", proven_bytes=2)
    for number, part in enumerate(made):
        part.dropped, part.runs_cut = {"empty": number, "low_score": 1}, 1
    return made


@pytest.fixture
def shares(tmp_path, parts):
    """Three shares with one, three and two parts."""
    ranges = [(0, 1), (1, 4), (4, 6)]
    return [
        write_share_of(tmp_path / f"share{number}", number, 3, parts[start:end])
        for number, (start, end) in enumerate(ranges, 1)
    ]


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_data_set_that_one_machine_makes(tmp_path, parts, shares):
    before = [files(folder) for folder in shares]
    reports = []
    manifest = merge([shares[2], shares[0], shares[1]], tmp_path / "new" / "out", lambda *told: reports.append(told))
    out = tmp_path / "new" / "out"
    assert load_manifest(out) == manifest
    want = expected(parts, 0.3, deduplicate=True)
    for split, ids in want.ids.items():
        assert read_shards(out, split) == [ids[at : at + 50] for at in range(0, len(ids), 50)]
    content = json.loads((out / "manifest.json").read_text())["content"]
    assert content["source"] == {"kind": "jsonl", "revision": f"sha256:{want.documents_sha256}"}
    assert content["dropped"] == {"empty": 15, "low_score": 6, "duplicates": 1} and content["runs_cut"] == 6
    assert content["options"] == {
        "shard_tokens": 50,
        "validation_fraction": 0.3,
        "minimum_score": 3.0,
        "deduplicate": True,
    }
    counts = {split: {"documents": want.documents[split], "tokens": len(want.ids[split])} for split in want.ids}
    assert content["splits"] == counts
    assert manifest.provenance.partitions == 3 and manifest.provenance.proven_bytes == 12
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*(s["name"] for s in content["shards"]), "manifest.json"]
    )
    assert [files(folder) for folder in shares] == before
    assert reports[-1] == (1.0, 60, sum(map(len, want.ids.values())))
    assert [report[:2] for report in reports[:-1]] == [
        (1 / 6, 10),
        (2 / 6, 10),
        (3 / 6, 25),
        (4 / 6, 30),
        (5 / 6, 50),
        (6 / 6, 60),
    ]


def test_any_number_of_shares_gives_the_same_bytes(tmp_path, parts, shares):
    whole = write_share_of(tmp_path / "whole", 1, 1, parts)
    # A machine may have nothing to do.
    uneven = [
        write_share_of(tmp_path / f"uneven{number}", number, 3, some)
        for number, some in enumerate((parts[:6], [], []), 1)
    ]
    contents = []
    for number, folders in enumerate(([whole], shares, uneven)):
        out = tmp_path / f"out{number}"
        content = merge(folders, out).content
        contents.append((content, {path.name: path.read_bytes() for path in out.glob("*.bin")}))
    assert contents[0] == contents[1] == contents[2]


def test_the_limit_ends_the_data_set_within_a_share(tmp_path, parts):
    cutting = {"limit_tokens": 70}
    shares = [
        write_share_of(tmp_path / f"share{number}", number, 2, some, cutting=cutting)
        for number, some in enumerate((parts[:3], parts[3:]), 1)
    ]
    content = merge(shares, tmp_path / "out").content
    want = expected(parts, 0.3, deduplicate=True, limit_tokens=70)
    assert want.parts_used == 3 and content.limited
    assert {split: counts.tokens for split, counts in content.splits.items()} == {
        split: len(ids) for split, ids in want.ids.items()
    }
    assert content.dropped.low_score == 3
    assert content.source.revision == f"sha256:{want.documents_sha256}"


def damage(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def remade(number, parts, **changes):
    """Another share 2 or 3 in the place of the one that is there."""

    def change(shares, all_parts):
        shutil.rmtree(shares[number - 1])
        of = changes.pop("of", 3)
        as_number = changes.pop("as_number", number)
        write_share_of(shares[number - 1], as_number, of, all_parts[slice(*parts)], **changes)

    return change


def unlink(name):
    return lambda shares, parts: (shares[1] / "parts" / name).unlink()


MISTAKES = {
    "missing": (lambda shares, parts: shares.pop(1), r"^share 2/3 missing"),
    "two missing": (lambda shares, parts: shares.__delitem__(slice(1, 3)), r"^shares 2/3, 3/3 missing"),
    "twice": (lambda shares, parts: shares.append(shares[0]), r"share1: share 1/3, as is .*share1"),
    "none": (lambda shares, parts: shares.clear(), "no folder named"),
    "not a share": (unlink("plan.json"), r"share2.parts.plan.json: no such file"),
    "unfinished": (unlink("share.json"), r"share2.parts.share.json: no such file"),
    "part gone": (unlink("000000-000002.ids"), "part 000000-000002 is missing or damaged.*--resume"),
    "record gone": (unlink("000000-000003.json"), "part 000000-000003 is missing or damaged.*--resume"),
    "share of another job": (
        lambda shares, parts: damage(shares[1] / "parts" / "share.json", lambda tree: tree.update(number=3)),
        "share2: its share.json is of another job",
    ),
    "part left out": (
        lambda shares, parts: damage(shares[1] / "parts" / "share.json", lambda tree: tree["parts"].pop(1)),
        "share2: part 000000-000003 begins at byte 300 .* ends at 200",
    ),
    "last part left out": (remade(3, (4, 5)), "the parts end at byte 500 of the source, which has 600"),
    "another cut": (
        remade(2, (1, 4), cutting={"shard_tokens": 60}),
        "share2: made with --shard-tokens 60, .*share1 with 50",
    ),
    "another filter": (remade(2, (1, 4), reading={"minimum_score": 2.5}), "--minimum-score 2.5, .* with 3.0"),
    "another number of shares": (remade(3, (4, 6), of=4), "share3: one share of 4, .*share1 one of 3"),
    "another revision": (
        remade(2, (1, 4), source={"kind": "jsonl", "revision": "2"}),
        "share2: its source's revision is 2",
    ),
    "another file": (
        remade(2, (1, 4), files=(PlannedFile(name="a", bytes=600, stamp="1"),)),
        r"share2: read a \(600 bytes\) where .*share1 read a \(350 bytes\)",
    ),
    "another version": (remade(2, (1, 4), most_bytes=7), "share2: made by another version"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_before_anything_is_written(tmp_path, shares, parts, mistake):
    change, says = MISTAKES[mistake]
    change(shares, parts)
    with pytest.raises(UserError, match=says) as caught:
        merge(shares, tmp_path / "made" / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "made").exists()


def test_a_folder_in_use_is_left_alone(tmp_path, shares):
    out = tmp_path / "out"
    merge(shares, out)
    before = files(out)
    with pytest.raises(UserError, match="already holds a data set"):
        merge(shares, out)
    assert files(out) == before
    before = files(shares[0])
    with pytest.raises(UserError, match="share1"):
        merge(shares, shares[0])
    assert files(shares[0]) == before


def test_a_damaged_part_leaves_nothing(tmp_path, shares):
    path = shares[2] / "parts" / "000000-000005.ids"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"share3.parts.000000-000005.ids: damaged"):
        merge(shares, tmp_path / "made" / "out")
    assert not (tmp_path / "made").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="damaged"):
        merge(shares, tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())


def test_a_disk_that_is_too_small(tmp_path, shares, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: usage(0, 0, 100))
    with pytest.raises(UserError, match="--out .*out: needs .* GB are free"):
        merge(shares, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(tmp_path, shares, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "fsync", full)
    with pytest.raises(UserError, match=r"out: No space left on device; mend that and merge again"):
        merge(shares, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_where_no_folder_can_be(tmp_path, shares):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        merge(shares, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="file: is a file"):
        merge(shares, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_split_without_documents(tmp_path, parts):
    share = write_share_of(tmp_path / "share", 1, 1, parts, cutting={"validation_fraction": 1e-9})
    with pytest.raises(UserError, match="--validation-fraction 1e-09: leaves no document of 60 for the val"):
        merge([share], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_merges_into_one_folder(tmp_path, shares):
    out = tmp_path / "merged"
    out.mkdir()
    with alone_in(out), pytest.raises(UserError, match="--out .*merged: another process is at work on it"):
        merge(shares, out)
    assert list(out.iterdir()) == []
    merge(shares, out)
    assert load_manifest(out)
