"""Steps for datatrove pipelines that write our shards, so that its local, Slurm and Ray executors run the job.

It needs the extra: ``pip install 'megaresid[datatrove]'``. There are two stages, as the shards are cut from all
documents in their order:

    from data_prep.datatrove_step import CutShards, Tokenize
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader

    tokenize = LocalPipelineExecutor(
        [ParquetReader("hf://datasets/HuggingFaceFW/fineweb/sample/10BT"), Tokenize("data/fineweb")],
        tasks=15, workers=4, logging_dir="logs/tokenize",
    )
    cut = LocalPipelineExecutor(
        [CutShards("data/fineweb", tasks=15, validation_fraction=0.001)],
        tasks=1, logging_dir="logs/cut", depends=tokenize,
    )
    cut.run()

``SlurmPipelineExecutor`` and ``RayPipelineExecutor`` take the same steps; the folder must be one that all machines see.
Filters go between the reader and ``Tokenize``.

The order of the documents is that of the tasks (their rank), and within a task that in which the steps before give
them. Readers deal files out to tasks, so the order, and with it shards and identity, are the same for the same number
of tasks, whatever runs how many of them at once; another number gives another order. A task that was stopped starts
over; one that is done keeps its part, whatever the steps before would give now: a changed pipeline wants a new folder.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_prep.assemble import Assembler
from data_prep.backends import BackendName
from data_prep.content import cut_of, manifest_of
from data_prep.job import Job
from data_prep.manifest import write_manifest
from data_prep.parts import PartRecord, read_record
from data_prep.plan import DOCUMENTS_SHA256, FORMAT, PARTS, Cutting, Plan, PlannedFile, PlannedShare, Reading
from data_prep.sources.batches import in_batches
from data_prep.sources.checked import refusal
from data_prep.sources.source import MOST_BYTES, UNIT_BYTES, Batch, Reader, Tally, Unit
from data_prep.tokenizer import RANKS_SHA256
from data_prep.worker import Worker, WorkerOptions
from data_prep.workplace import remove_shards
from megaresid.data.manifest import MANIFEST_NAME
from megaresid.errors import UserError

KIND = "datatrove"
DEFAULT_CUTTING = Cutting(
    shard_tokens=Job.shard_tokens, validation_fraction=Job.validation_fraction, deduplicate=False
)


class Tokenize(PipelineStep):
    """Encodes the documents of its task into one part in folder ``out``; gives no documents to a step after it.

    The last step of the first stage. ``vocab_file`` and ``backend`` are as ``--vocab-file`` and
    ``--tokenizer-backend``. Raises UserError without a vocabulary and where ``out`` holds a data set.
    """

    name = "Tokenize"
    type = "megaresid"

    def __init__(self, out: str | Path, vocab_file: str | Path | None = None, backend: BackendName = "auto"):
        super().__init__()
        self.out, self.vocab_file, self.backend = Path(out), vocab_file and Path(vocab_file), backend

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        check_no_data_set(self.out)
        parts, plan, unit = self.out / PARTS, plan_of_tasks(world_size).sha256, unit_of(rank)
        if (record := read_record(parts, unit.name, plan)) is None:
            parts.mkdir(parents=True, exist_ok=True)
            worker = Worker(WorkerOptions(DocumentReader(data), parts, plan, self.vocab_file, self.backend))
            with self.track_time(unit="task"):
                record = worker.make_part(unit)
        self.stat_update("documents", value=record.documents, unit="task")
        self.stat_update("tokens", value=record.tokens, unit="task")


class CutShards(PipelineStep):
    """Cuts the shards of ``out`` from the parts of all ``tasks`` of ``Tokenize`` and writes the manifest.

    The only step of the second stage, which depends on the first and has one task. The options are those of
    ``python -m data_prep``. Raises UserError where a task is not done, or was one of another number of tasks.
    """

    name = "Cut shards"
    type = "megaresid"

    def __init__(
        self,
        out: str | Path,
        tasks: int,
        shard_tokens: int = Job.shard_tokens,
        validation_fraction: float = Job.validation_fraction,
        deduplicate: bool = False,
        limit_tokens: int | None = None,
    ):
        super().__init__()
        self.out, self.tasks = Path(out), tasks
        options = {
            "shard_tokens": shard_tokens,
            "validation_fraction": validation_fraction,
            "deduplicate": deduplicate,
            "limit_tokens": limit_tokens,
        }
        Job(source="text", out=self.out, **options).check()
        self.cutting = Cutting(**options)

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        if world_size != 1:
            raise UserError(f"CutShards: its stage has {world_size} tasks; give that executor tasks=1")
        check_no_data_set(self.out)
        plan, parts = plan_of_tasks(self.tasks, self.cutting), self.out / PARTS
        records = [self._record(plan, task) for task in range(self.tasks)]
        # Of an attempt that was stopped.
        remove_shards(self.out)
        with Assembler(self.out, parts, cut_of(plan)) as assembler:
            for record in records:
                if not assembler.add(record, parts):
                    break
            assembled = assembler.finish()
        try:
            manifest = manifest_of(plan, assembled)
        except UserError:
            remove_shards(self.out)
            raise
        write_manifest(self.out, manifest)
        shutil.rmtree(parts)
        for split, counts in manifest.content.splits.items():
            self.stat_update(f"{split} documents", value=counts.documents, unit="task")
            self.stat_update(f"{split} tokens", value=counts.tokens, unit="task")

    def _record(self, plan: Plan, task: int) -> PartRecord:
        record = read_record(self.out / PARTS, unit_of(task).name, plan.sha256)
        if record is None:
            raise UserError(
                f"{self.out / PARTS}: no part of task {task} of {self.tasks}; run Tokenize with {self.tasks} tasks to "
                "its end, or say how many it had"
            )
        return record


class DocumentReader(Reader):
    """The documents of one task as what a worker reads."""

    def __init__(self, documents: Iterable[Document] | None):
        self.documents = documents or ()

    def read(self, unit: Unit, tally: Tally) -> Iterator[Batch]:
        return in_batches(self._documents(unit, tally))

    def _documents(self, unit: Unit, tally: Tally) -> Iterator[tuple[bytes, int]]:
        for document in self.documents:
            text = utf8(document.text)
            if reason := refusal(text):
                tally[reason] += 1
            else:
                yield text, unit.bytes


def utf8(text: str) -> bytes:
    """The text's bytes, half surrogate pairs as U+FFFD."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def unit_of(task: int) -> Unit:
    """A task is one unit; nobody knows its bytes, so each counts as one."""
    return Unit(group=task, index=0, position=task, bytes=1, segments=())


def plan_of_tasks(tasks: int, cutting: Cutting = DEFAULT_CUTTING) -> Plan:
    """The plan of a job of so many tasks. Its sha256 says how many, and nothing of how the shards are cut."""
    return Plan(
        format=FORMAT,
        unit_bytes=UNIT_BYTES,
        most_bytes=MOST_BYTES,
        tokenizer_sha256=RANKS_SHA256,
        source={"kind": KIND, "revision": f"sha256:{DOCUMENTS_SHA256}"},
        inputs=(),
        reading=Reading(source=KIND, text_column="text"),
        cutting=cutting,
        share=PlannedShare(number=1, of=1),
        files=tuple(PlannedFile(name=f"task {task}", bytes=1, stamp="") for task in range(tasks)),
    )


def check_no_data_set(out: Path) -> None:
    if (out / MANIFEST_NAME).exists():
        raise UserError(f"{out}: already holds a data set; name another folder, or delete this one")
