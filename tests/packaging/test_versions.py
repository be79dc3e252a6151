"""All distributions of the repository carry one version, and constraints.txt covers what they need."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fairlead

ROOT = Path(__file__).parents[2]


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def version_violations(root: dict[str, Any], platforms: list[dict[str, Any]], module_version: str) -> list[str]:
    """Where the root, the platforms, their pins on each other and fairlead.__version__ disagree."""
    version = root["project"]["version"]
    found = [] if module_version == version else [f"fairlead.__version__ is {module_version}, not {version}"]
    names = {platform["project"]["name"] for platform in platforms}
    for platform in platforms:
        name, own = platform["project"]["name"], platform["project"]["version"]
        if own != version:
            found.append(f"{name} has version {own}, not {version}")
        if f"fairlead=={version}" not in platform["project"]["dependencies"]:
            found.append(f"{name} does not depend on fairlead=={version}")
    pins = [pin for extra in root["project"]["optional-dependencies"].values() for pin in extra]
    for requirement in map(Requirement, pins):
        if requirement.name.startswith("fairlead-"):
            if str(requirement.specifier) != f"=={version}":
                found.append(f"an extra pins {requirement}, not =={version}")
            if requirement.name not in names:
                found.append(f"an extra names {requirement.name}, which is not under platforms/")
    return found


def constraint_violations(requirements: list[str], constraints: list[str]) -> list[str]:
    """Requirements without a pin that satisfies them, and lines that are no plain pin."""
    pins: dict[str, Version] = {}
    found = []
    for line in constraints:
        name, separator, version = line.partition("==")
        if not separator or Version(version).local:
            found.append(f"{line!r} is no NAME==VERSION without a local part")
        else:
            pins[canonicalize_name(name)] = Version(version)
    for requirement in map(Requirement, requirements):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None or not requirement.specifier.contains(pin):
            found.append(f"{requirement} has the pin {pin}")
    return found


def test_versions_are_in_lockstep() -> None:
    platforms = [read(path) for path in sorted((ROOT / "platforms").glob("*/pyproject.toml"))]
    assert platforms
    assert version_violations(read(ROOT / "pyproject.toml"), platforms, fairlead.__version__) == []


def test_constraints_cover_every_requirement() -> None:
    root = read(ROOT / "pyproject.toml")
    requirements = [
        *root["project"]["dependencies"],
        *root["dependency-groups"]["dev"],
        *root["build-system"]["requires"],
    ]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert constraint_violations(requirements, [line for line in lines if line and not line.startswith("#")]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": "0.2.0"}, "fairlead.__version__ is 0.2.0, not 0.1.0"),
        ({"platform": "0.2.0"}, "fairlead-x has version 0.2.0, not 0.1.0"),
        ({"dependency": "fairlead>=0.1.0"}, "fairlead-x does not depend on fairlead==0.1.0"),
        ({"extra": "fairlead-x==0.2.0"}, "an extra pins fairlead-x==0.2.0, not ==0.1.0"),
        ({"extra": "fairlead-y==0.1.0"}, "an extra names fairlead-y, which is not under platforms/"),
    ],
)
def test_a_version_that_lags_is_found(change: dict[str, str], message: str) -> None:
    extra = change.get("extra", "fairlead-x==0.1.0")
    dependency = change.get("dependency", "fairlead==0.1.0")
    root = {"project": {"version": "0.1.0", "optional-dependencies": {"x": [extra]}}}
    platform = {"name": "fairlead-x", "version": change.get("platform", "0.1.0"), "dependencies": [dependency]}
    assert version_violations(root, [{"project": platform}], change.get("module", "0.1.0")) == [message]


def test_a_pin_that_is_missing_or_wrong_is_found() -> None:
    found = constraint_violations(["a>=1", "B_c>=2", "d"], ["a==0.9", "b-c==2.1", "e>=1", "f==1.0+cpu"])
    assert found == [
        "'e>=1' is no NAME==VERSION without a local part",
        "'f==1.0+cpu' is no NAME==VERSION without a local part",
        "a>=1 has the pin 0.9",
        "d has the pin None",
    ]
