"""A comparison as files: one page for a browser, the same in Markdown and in JSON, and the plots."""

import base64
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megaresid import durable
from megaresid.compare import plots, tables, wording
from megaresid.compare.results import Comparison

MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>#!|~$&])")


def write(comparison: Comparison, out: Path) -> None:
    """Write ``report.html``, ``report.md``, ``report.json`` and ``plots/NAME.svg`` and ``.png`` below ``out``.

    Each file is there whole or not at all, the page last; files of these names from an earlier report are replaced.
    The page needs no other file, no network and no script. Raises OSError where the disk takes no more.
    """
    drawings = plots.draw(comparison)
    pictures = {drawing.name: plots.as_svg(drawing.figure) for drawing in drawings}
    (out / "plots").mkdir(parents=True, exist_ok=True)
    # First: it marks the folder as a report's, which may be written again where this stops half way.
    durable.write_text(out / "report.json", comparison.model_dump_json(indent=2) + "\n")
    for drawing in drawings:
        durable.write_text(out / "plots" / f"{drawing.name}.svg", pictures[drawing.name])
        _write_bytes(out / "plots" / f"{drawing.name}.png", plots.as_png(drawing.figure))
    durable.write_text(out / "report.md", as_markdown(comparison, drawings))
    durable.write_text(out / "report.html", as_html(comparison, drawings, pictures))


def as_html(comparison: Comparison, drawings: Sequence[plots.Drawing], pictures: dict[str, str]) -> str:
    """The page, with the pictures (SVG by the drawing's name) in it."""
    environment = _environment()
    data = {name: base64.b64encode(svg.encode()).decode() for name, svg in pictures.items()}
    return environment.get_template("report.html.j2").render(_content(comparison, drawings), data=data)


def as_markdown(comparison: Comparison, drawings: Sequence[plots.Drawing]) -> str:
    """The same, with links to the plots."""
    environment = _environment(finalize=_plain_markdown)
    return environment.get_template("report.md.j2").render(_content(comparison, drawings))


def _environment(**options: Any) -> Environment:
    options |= {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Environment(loader=PackageLoader("megaresid.compare"), keep_trailing_newline=True, **options)


def _content(comparison: Comparison, drawings: Sequence[plots.Drawing]) -> dict[str, Any]:
    return {
        "comparison": comparison,
        "findings": wording.findings(comparison),
        "footing": wording.footing(comparison),
        "baseline_words": wording.baseline_words(comparison),
        "warnings": wording.warnings(comparison),
        "drawings": {drawing.name: drawing for drawing in drawings},
        "tables": tables,
    }


def _plain_markdown(value: Any) -> Any:
    """What a template prints, without meaning in Markdown: names come from files that anybody may have written."""
    if isinstance(value, Markup):
        return value
    text = "".join(character if character.isprintable() else " " for character in str(value))
    return Markup(MARKDOWN_SPECIAL.sub(r"\\\1", text))


def _write_bytes(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        durable.sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    durable.sync(path.parent)
