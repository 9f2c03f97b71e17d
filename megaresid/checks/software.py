"""Python, what compiles for it, and the versions of the packages against the ranges of setup.cfg."""

import configparser
import os
import platform
import shlex
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megaresid.checks.finding import Finding, fault, ok, warning

SETUP = Path(__file__).parents[2] / "setup.cfg"
EXTRAS = ("gpu", "eval", "fast", "datatrove")
INSTALL = "bash launch/quickstart.sh brings the environment up to date, or: pip install"

Ranges = dict[str, list[Requirement]]
"""Requirements by extra; those of every installation under ""."""


def required(setup: Path = SETUP) -> tuple[SpecifierSet, Ranges]:
    """The range of Python and of the packages: of the checkout, or of the package as it was installed."""
    if setup.is_file():
        parser = configparser.ConfigParser()
        parser.read(setup, encoding="utf-8")
        options, extras = parser["options"], parser["options.extras_require"]
        lines = {"": options["install_requires"], **{extra: extras[extra] for extra in EXTRAS}}
        ranges = {extra: [Requirement(line) for line in text.split("\n") if line] for extra, text in lines.items()}
        return SpecifierSet(options["python_requires"]), ranges
    about = metadata.metadata("megaresid")
    every = [Requirement(line) for line in metadata.requires("megaresid") or ()]
    ranges = {extra: [r for r in every if _is_of(r, extra)] for extra in ("", *EXTRAS)}
    return SpecifierSet(about["Requires-Python"] or ""), ranges


def _is_of(requirement: Requirement, extra: str) -> bool:
    without = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    return without if not extra else not without and requirement.marker.evaluate({"extra": extra})


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python(wanted: SpecifierSet, version: str = platform.python_version()) -> Iterator[Finding]:
    if wanted.contains(version, prereleases=True):
        yield ok("Python", version)
    else:
        yield fault("Python", f"{version} is outside {wanted}", "name another in MEGARESID_PYTHON and install anew")


def packages(
    ranges: Ranges, on_gpu: bool, version_of: Callable[[str], str | None] = installed_version
) -> Iterator[Finding]:
    """What is missing or out of range, and in one line what is as it should be."""
    good = []
    for extra, requirements in ranges.items():
        needed = not extra or (extra == "gpu" and on_gpu)
        absent = [r.name for r in requirements if version_of(r.name) is None]
        if absent and not needed:
            yield ok("packages", f"{', '.join(absent)} not installed, optional: pip install \"megaresid[{extra}]\"")
        for requirement in requirements:
            version = version_of(requirement.name)
            told = fault if needed else warning
            if version is None:
                if needed:
                    yield told("packages", f"{requirement.name} is missing", f'{INSTALL} "{requirement}"')
            elif not requirement.specifier.contains(version, prereleases=True):
                words = f"{requirement.name} {version} is outside {requirement.specifier}"
                yield told("packages", words, f'{INSTALL} "{requirement}"')
            else:
                good.append(f"{requirement.name} {version}")
    yield ok("packages", f"{len(good)} within their ranges ({', '.join(good[:2])}, ...)")


def compiler(built: bool, include: Path | None = None) -> Iterator[Finding]:
    """Python's headers and a C++ compiler, which DeepSpeed's operators are compiled with; once they are built, what is
    missing is missed by the next version only."""
    include = include or Path(sysconfig.get_path("include"))
    told = warning if built else fault
    if (include / "Python.h").is_file():
        yield ok("headers", str(include))
    else:
        yield told("headers", f"no Python.h in {include}", "install Python's headers (Debian: python3-dev)")
    named = shlex.split(os.environ.get("CXX") or "c++")[0]
    if where := shutil.which(named):
        yield ok("compiler", where)
    else:
        yield told("compiler", f"no C++ compiler ({named})", "install g++, or name another in CXX")
