"""Where documents come from: one module a kind of source."""

from data_prep.sources.source import Source
from megaresid.errors import UserError


def open_source(job) -> Source:
    """The source that the options of a job (data_prep.job.Job) name; nothing but the list of its files is read.

    Raises UserError when inputs are missing, match nothing, or are given to a source that takes none.
    """
    # Imported here: a job needs one kind, and some are slow to import.
    if job.source in ("fineweb", "hub"):
        from data_prep.sources.hub import open_hub

        return open_hub(job)
    if job.source == "python-docs":
        from data_prep.sources.python_docs import PythonDocs

        if job.input:
            raise UserError(
                f"--input {job.input[0]}: --source {job.source} reads this Python's own library; leave --input out"
            )
        return PythonDocs()
    if not job.input:
        raise UserError(f"--input: --source {job.source} needs at least one file, folder or pattern")
    if job.source == "text":
        from data_prep.sources.text import TextFiles as Kind
    elif job.source == "jsonl":
        from data_prep.sources.jsonl import JsonLines as Kind
    else:
        from data_prep.sources.parquet import ParquetFiles as Kind
    return Kind.open(job)
