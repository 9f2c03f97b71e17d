"""The files that a benchmark writes: ``--json`` and ``--plot``, checked before anything is measured."""

from pathlib import Path

from megaresid.errors import UserError

PICTURES = (".png", ".svg", ".pdf")


def check_outputs(json: Path | None, plot: Path | None) -> None:
    """Raises UserError for files that cannot both be new ones, or a picture of a kind that is not drawn."""
    if plot is not None and plot.suffix not in PICTURES:
        raise UserError(f"--plot {plot}: name a file that ends in {', '.join(PICTURES)}")
    files = _named(json, plot)
    for option, file in files:
        if file.exists():
            raise UserError(f"{option} {file}: it is there already: name another file, or delete it")
    if len({file.resolve() for _, file in files}) < len(files):
        raise UserError(f"--json and --plot both name {plot}: name two files")


def make_folders(json: Path | None, plot: Path | None) -> None:
    """Make the folders of the files to be written, once all else is checked. Raises UserError."""
    for option, file in _named(json, plot):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {file}: {error.strerror}: name another file") from None


def _named(json: Path | None, plot: Path | None) -> list[tuple[str, Path]]:
    """What is to be written, with the option that names it."""
    return [(option, file) for option, file in (("--json", json), ("--plot", plot)) if file is not None]
