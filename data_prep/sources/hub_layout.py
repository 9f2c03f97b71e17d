"""Which files of a data set's repository belong to a configuration: its card says so, or the usual layouts do.

Only the training split is read, and only one kind of file: the one of which there are most.
"""

import re
from pathlib import PurePosixPath

from huggingface_hub import DatasetCard

from data_prep.sources.jsonl import JsonLines
from data_prep.sources.parquet import ParquetFiles
from megaresid.errors import UserError

KINDS = {source.kind: source.suffixes for source in (ParquetFiles, JsonLines)}
# FineWeb's and FineWeb-Edu's, for a local copy without the card; other configurations are folders in data/.
FINEWEB = {
    "default": ["data/*/*"],
    **{f"sample-{size}": [f"sample/{size}/*"] for size in ("10BT", "100BT", "350BT")},
}
TRAIN = re.compile(r"(^|[/._-])train(ing)?([/._-]|$)", re.IGNORECASE)
HELD_OUT = re.compile(r"(^|[/._-])(test(ing)?|valid(ation)?|val|dev|eval(uation)?)([/._-]|$)", re.IGNORECASE)


def select(names: list[str], card: str | None, config: str | None, fineweb: bool = False) -> tuple[str, list[str]]:
    """The kind (parquet or jsonl) and the names, sorted, of the files that are a configuration's training split.

    ``names`` are all files of the repository, ``card`` its README.md; None as ``config`` means its default. A card
    lists patterns for each configuration; without such a list (and for ``fineweb``, without a card, FineWeb's own) the
    files are those in a folder named like the configuration, at the top or in data/, or without one those in data/,
    else all. Raises UserError for an unknown configuration, naming the known ones, and where no file is left.
    """
    patterns, default = patterns_of(card)
    if not patterns and fineweb:
        patterns = FINEWEB | {config: FINEWEB.get(config, [f"data/{config}/*"])}
    if patterns:
        config = config or default
        if config is None:
            raise UserError(f"--dataset-config: the data set has several, name one of {listed(patterns)}")
        if config not in patterns:
            raise UserError(f"--dataset-config {config}: no such configuration; there are {listed(patterns)}")
        matches = [matcher(pattern) for pattern in patterns[config]]
        chosen = [name for name in names if any(match.fullmatch(name) for match in matches)]
        if all(pattern.endswith("**") for pattern in patterns[config]):
            chosen = training(chosen)
    else:
        chosen = training(in_folder(names, config))
    return one_kind(chosen, config)


def patterns_of(card: str | None) -> tuple[dict[str, list[str]], str | None]:
    """The glob patterns of each configuration's training split, none without a list; which one is the default.

    The list stands in the YAML at the head of the card: ``configs: [{config_name, data_files, data_dir, default}]``,
    where data_files is a pattern, patterns, or ``{split, path}`` for each split.
    """
    if card is None or not card.startswith("---"):
        return {}, None
    try:
        configs = DatasetCard(card, ignore_metadata_errors=True).data.to_dict().get("configs") or []
        patterns = {config.get("config_name", "default"): _train_patterns(config) for config in configs}
        chosen = [config.get("config_name", "default") for config in configs if config.get("default")]
        defaults = chosen or [name for name in patterns if name == "default" or len(patterns) == 1]
        return patterns, defaults[0] if defaults else None
    # The YAML is whatever somebody wrote: its library raises its own errors for what is no YAML.
    except Exception as error:
        raise UserError(
            f"README.md: the data set's card cannot be read ({str(error).splitlines()[0]}); download the files and "
            "name them with --source parquet or jsonl"
        ) from None


def _train_patterns(config: dict) -> list[str]:
    folder = config.get("data_dir", "")
    files = config.get("data_files", "**")
    if isinstance(files, dict):
        files = [{"split": split, "path": path} for split, path in files.items()]
    patterns: list[str] = []
    for entry in files if isinstance(files, list) else [files]:
        if isinstance(entry, str):
            patterns.append(entry)
        elif entry.get("split", "train") == "train":
            path = entry["path"]
            patterns.extend([path] if isinstance(path, str) else path)
    return [str(PurePosixPath(folder, pattern)) for pattern in patterns]


def matcher(pattern: str) -> re.Pattern:
    """A glob over paths in a repository: ``*`` and ``?`` stay in one folder, ``**`` crosses them; a folder means all
    that is in it."""
    expression = ""
    for part in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        special = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        expression += special.get(part) or (part if part.startswith("[") else re.escape(part))
    return re.compile(f"{expression}(?:/.*)?" if not is_data(pattern) and "*" not in pattern else expression)


def in_folder(names: list[str], config: str | None) -> list[str]:
    """The files of a configuration by the usual layouts."""
    data = [name for name in names if is_data(name)]
    if config is None or config == "default":
        return [name for name in data if name.startswith("data/")] or data
    for folder in (f"{config}/", f"data/{config}/"):
        if chosen := [name for name in data if name.startswith(folder)]:
            return chosen
    folders = sorted({name.removeprefix("data/").split("/")[0] for name in data if "/" in name.removeprefix("data/")})
    there = f"there are {listed(folders)}" if folders else "the data set has one only, leave the option out"
    raise UserError(f"--dataset-config {config}: no such folder in the data set; {there}")


def training(names: list[str]) -> list[str]:
    """Those that a path says to be the training split, where any does; else those that are not held out."""
    return [name for name in names if TRAIN.search(name)] or [name for name in names if not HELD_OUT.search(name)]


def one_kind(names: list[str], config: str | None) -> tuple[str, list[str]]:
    of_kind = {kind: sorted(name for name in names if name.endswith(ends)) for kind, ends in KINDS.items()}
    kind = max(of_kind, key=lambda kind: len(of_kind[kind]))
    if not of_kind[kind]:
        raise UserError(
            f"--dataset-config {config or 'default'}: no parquet or jsonl files of a training split in the data set; "
            "the Hub makes parquet copies of many: try --revision refs/convert/parquet"
        )
    return kind, of_kind[kind]


def is_data(name: str) -> bool:
    return name.endswith(tuple(end for ends in KINDS.values() for end in ends))


def listed(names) -> str:
    """Names for a message: not a hundred of them."""
    names = list(names)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
