"""What a job is expected to take, and that what cannot fit is refused before anything is written."""

import dataclasses
import shutil
from collections import Counter, namedtuple
from pathlib import Path

import pytest
from jobs import DOCUMENTS, expected_tokens, gpt2, job, small_units, write_rows

from data_prep import estimate as module
from data_prep.estimate import Sample, check_download, estimate, sample_of, take_sample
from data_prep.pipeline import prepare
from data_prep.progress import Pace, duration
from data_prep.sources.source import Batch, Reader, Segment, Share, Source, Unit, Unreadable
from megaresid.errors import UserError

Usage = namedtuple("Usage", "total used free")


class Lines:
    """A backend of which a token is a line."""

    name = "lines"

    def encode(self, text):
        return [0] * (text.count(b"\n") + 1)


class Batches(Reader):
    def __init__(self, batches, error=None):
        self.batches, self.error = batches, error
        self.read_batches = 0

    def read(self, unit, tally):
        for batch in self.batches:
            self.read_batches += 1
            yield batch
        if self.error:
            raise self.error


UNIT = Unit(0, 0, 0, 1000, (Segment(Path("x"), "x"),))


def source_of(size: int, download: int = 0, folder: Path | None = None) -> Source:
    source = Source([], Reader())
    source.bytes, source.download_folder = size, folder
    source.download_bytes = lambda share: download
    return source


# 100 source bytes hold 4 documents of 50 bytes; 10 tokens come of 40 of them.
SAMPLE = Sample(
    source_bytes=100,
    documents=4,
    text_bytes=200,
    encoded_bytes=40,
    tokens=10,
    reading_seconds=0.5,
    encoding_seconds=0.1,
)


def test_the_whole_is_like_the_sample(tmp_path):
    found = estimate(job("x", tmp_path, workers=4), source_of(10_000), SAMPLE, [], 4, 0)
    assert (found.source_bytes, found.documents, found.tokens) == (10_000, 400, 5_000)
    # A token is two bytes in the parts and two in the shards; a document 36 bytes in the parts. A shard of 100 tokens
    # has a header of 1024, and each split one that is not full.
    assert (found.parts_bytes, found.shards_bytes) == (2 * 5_000 + 36 * 400, 2 * 5_000 + 52 * 1024)
    # Reading: 0.5 s per 100 bytes; encoding: 0.1 s per 40 bytes of text, of which there are 20,000.
    assert found.seconds == pytest.approx((10_000 * 0.005 + 20_000 * 0.0025) / 4)
    assert "5,000 tokens in 400 documents" in str(found) and "4 workers" in str(found)


def test_a_share_has_its_fraction_and_no_shards(tmp_path):
    found = estimate(job("x", tmp_path, partition=Share(2, 4)), source_of(10_000), SAMPLE, [], 1, 0)
    assert (found.source_bytes, found.tokens, found.shards_bytes) == (2_500, 1_250, 0)
    assert "(parts, to be merged)" in str(found) and "removed" not in str(found)
    assert "removed at the end" in str(estimate(job("x", tmp_path), source_of(10_000), SAMPLE, [], 1, 0))
    limited = job("x", tmp_path, partition=Share(2, 4), limit_tokens=1_000)
    assert estimate(limited, source_of(10_000), SAMPLE, [], 1, 0).tokens == 1_250, "a share is made whole"


def test_a_limit_ends_the_source(tmp_path):
    limited = job("x", tmp_path, limit_tokens=1_000, shard_tokens=10**6)
    found = estimate(limited, source_of(10_000), SAMPLE, [], 1, 0)
    assert (found.source_bytes, found.documents, found.tokens) == (2_000, 80, 1_000)
    assert (found.parts_bytes, found.shards_bytes) == (2_000 + 36 * 80, 2_000 + 2 * 1024)
    # The unit in which it ends is made whole, and two more for each worker meanwhile: so many bytes of the source.
    for workers, source_bytes in ((1, 2_000 + 3 * 1_000), (2, 2_000 + 5 * 1_000), (9, 10_000)):
        more = estimate(limited, source_of(10_000), SAMPLE, [], workers, 1_000)
        assert more.parts_bytes == 2 * source_bytes // 2 + 36 * source_bytes * 4 // 100
        assert (more.tokens, more.shards_bytes) == (found.tokens, found.shards_bytes)
    unreached = job("x", tmp_path, limit_tokens=10**9)
    assert estimate(unreached, source_of(10_000), SAMPLE, [], 1, 1_000) == estimate(
        job("x", tmp_path), source_of(10_000), SAMPLE, [], 1, 1_000
    )
    # 0.5 tokens a byte: the bytes are rounded up, the tokens not beyond the limit.
    assert estimate(dataclasses.replace(limited, limit_tokens=999), source_of(10_000), SAMPLE, [], 1, 0).tokens == 999


def test_parts_that_are_there_need_no_more_space_and_no_time(tmp_path):
    Found = namedtuple("Found", "bytes")
    found = estimate(job("x", tmp_path), source_of(10_000), SAMPLE, [Found(4_000), Found(3_500)], 1, 0)
    assert found.parts_bytes == (2 * 5_000 + 36 * 400) // 4 and found.shards_bytes == 2 * 5_000 + 52 * 1024
    assert found.seconds == pytest.approx((10_000 * 0.005 + 20_000 * 0.0025) / 4)


def test_digests_to_look_for_duplicates_take_space(tmp_path):
    jobs = [job("x", tmp_path, deduplicate=deduplicate) for deduplicate in (False, True)]
    plain, seen = (estimate(made, source_of(10_000), SAMPLE, [], 1, 0) for made in jobs)
    assert seen.parts_bytes - plain.parts_bytes >= 2 * 16 * 400


def test_an_empty_sample_expects_nothing(tmp_path):
    found = estimate(job("x", tmp_path), source_of(10_000), Sample(), [], 1, 0)
    assert (found.tokens, found.documents, found.seconds) == (0, 0, 0.0)


def free(monkeypatch, **bytes_free):
    """Folders by their names have this much free; others have everything."""
    monkeypatch.setattr(
        module.shutil, "disk_usage", lambda folder: Usage(0, 0, bytes_free.get(Path(folder).name, 10**18))
    )


def test_what_cannot_fit_is_refused(tmp_path, monkeypatch):
    found = estimate(job("x", tmp_path), source_of(10_000), SAMPLE, [], 1, 0)
    needed = 4 * 5_000 + 36 * 400 + 52 * 1024
    for there, fits in ((needed, True), (needed - 1, False)):
        free(monkeypatch, **{tmp_path.name: there})
        if fits:
            found.check_disk(tmp_path / "new" / "out")
        else:
            with pytest.raises(UserError, match=f"--out .*out: needs about {needed:,} bytes .*{there:,} are free"):
                found.check_disk(tmp_path / "new" / "out")


def test_a_download_to_the_same_disk_counts(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    source = source_of(10_000, download=10**6, folder=tmp_path / "cache")
    found = estimate(job("x", tmp_path), source, SAMPLE, [], 1, 0)
    free(monkeypatch, **{tmp_path.name: 10**6})
    with pytest.raises(UserError, match=f"needs about {10**6 + 4 * 5_000 + 36 * 400 + 52 * 1024:,} bytes"):
        found.check_disk(tmp_path / "out")
    free(monkeypatch, cache=10**6 - 1)
    with pytest.raises(UserError, match="1,000,000 bytes are to be downloaded to .*cache, and 999,999 are free"):
        check_download(source, job("x", tmp_path))
    free(monkeypatch, cache=10**6)
    check_download(source, job("x", tmp_path))


def test_a_job_that_cannot_fit_writes_nothing(tmp_path, monkeypatch):
    small_units(monkeypatch)
    rows = write_rows(tmp_path / "rows.jsonl", DOCUMENTS)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 5_000))
    with pytest.raises(UserError, match="--out .*5,000 are free"):
        prepare(job(rows, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_expectation_of_a_job_is_near_what_it_makes(tmp_path, monkeypatch):
    small_units(monkeypatch)
    rows = write_rows(tmp_path / "rows.jsonl", DOCUMENTS * 4)
    said = []
    assert prepare(job(rows, tmp_path / "out", dry_run=True), say=said.append) is None
    assert not (tmp_path / "out").exists()
    tokens = int(said[-1].split("expected: ")[1].split(" tokens")[0].replace(",", ""))
    assert tokens == pytest.approx(sum(map(len, expected_tokens(DOCUMENTS * 4, 0.2).values())), rel=0.1)


def test_a_sample_is_what_was_read(monkeypatch):
    batches = [Batch([b"a\nb", b"c"], 300), Batch([b"dd\n\n"], 900)]
    sample = take_sample(Batches(batches), UNIT, Lines(), False)
    # <|endoftext|> before each document is a token too; all of the unit was read.
    assert sample.tokens == (1 + 2) + (1 + 1) + (1 + 3)
    assert (sample.documents, sample.text_bytes, sample.encoded_bytes, sample.source_bytes) == (3, 8, 8, 1000)


def test_a_sample_ends_early(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_BYTES", 4)
    reader = Batches([Batch([b"a\nb", b"c"], 300), Batch([b"dd\n\n"], 900)])
    sample = take_sample(reader, UNIT, Lines(), False)
    assert reader.read_batches == 1 and (sample.documents, sample.source_bytes) == (2, 300)
    monkeypatch.setattr(module, "SAMPLE_BYTES", 10**9)
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 0.0)
    reader = Batches(reader.batches)
    take_sample(reader, UNIT, Lines(), False)
    assert reader.read_batches == 1


def test_only_the_beginning_of_a_huge_document_is_encoded(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_DOCUMENT_BYTES", 7)
    document = "aaé日本\n" * 100
    seen = []

    class Seen(Lines):
        def encode(self, text):
            seen.append(text)
            return super().encode(text)

    sample = take_sample(Batches([Batch([document.encode()], 500)]), UNIT, Seen(), False)
    assert seen == ["aaé日".encode()] and sample.text_bytes == len(document.encode()) and sample.encoded_bytes == 7


class Places(Source):
    """Of 1000 bytes in ten units; the reader gives one document of as many lines as the unit's number says."""

    def __init__(self, download):
        super().__init__([], self)
        self.bytes, self.download, self.asked = 1000, download, []

    def units(self, share):
        return (Unit(n, 0, 100 * n, 100, ()) for n in range(10) if share.has(100 * n, 1000))

    def download_bytes(self, share):
        return self.download

    def read(self, unit, tally):
        self.asked.append(unit.group)
        yield Batch([b"a" + b"\n" * unit.group], 100)


def test_a_source_is_sampled_at_several_places_where_it_is_here(tmp_path):
    source = Places(download=0)
    sample = sample_of(job("x", tmp_path), source, Lines())
    # The first units that begin in each quarter of the bytes.
    assert source.asked == [0, 3, 5, 8]
    assert (sample.documents, sample.source_bytes, sample.tokens) == (4, 400, sum(n + 2 for n in source.asked))
    source = Places(download=1)
    assert sample_of(job("x", tmp_path), source, Lines()).documents == 1 and source.asked == [0]


def test_what_cannot_be_read_is_no_sample():
    reader = Batches([Batch([b"a"], 10)], Unreadable("x", "broken"))
    with pytest.raises(Unreadable):
        take_sample(reader, UNIT, Lines(), False)
    assert take_sample(reader, UNIT, Lines(), True).documents == 1


def test_the_sample_of_gpt2_is_exact():
    texts = [text.encode() for text in DOCUMENTS]

    class GPT2(Lines):
        def encode(self, text):
            return gpt2().encode_to_numpy(text.decode(), disallowed_special=())

    sample = take_sample(Batches([Batch(texts, 1000)]), UNIT, GPT2(), False)
    assert sample.tokens == sum(map(len, expected_tokens(DOCUMENTS, 0.2).values()))


def test_pace_counts_from_the_first_report():
    clock = Counter(now=0)
    pace = Pace(lambda: clock["now"])
    # Half was there when the job was resumed.
    assert pace.line(0.5, 1_000, 1_000_000) == "1,000 documents  1,000,000 tokens"
    clock["now"] = 10
    assert pace.line(0.6, 1_200, 1_200_000) == "1,200 documents  1,200,000 tokens (20,000/s)  40 s left"
    clock["now"] = 100
    assert pace.line(0.6, 1_200, 1_200_000) == "1,200 documents  1,200,000 tokens (2,000/s)  7 min left"
    assert pace.line(0.75, 0, 0) == "2 min left"


@pytest.mark.parametrize(
    "seconds, said", [(0.4, "0 s"), (99.4, "99 s"), (100, "2 min"), (3600, "60 min"), (11_100, "3 h 05 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said
