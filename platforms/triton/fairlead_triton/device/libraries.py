"""Optional libraries, and the torch that is installed: what is there, read from their files without an import."""

import importlib.metadata
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Version = Callable[[str], str | None]
"""Distribution to its version; None if it is not installed."""
Load = Callable[[str], Any]
"""Imports a module by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """The installed torch: its version, and the toolkit that it was built for (all None: the CPU alone)."""

    version: str
    cuda: str | None = None
    hip: str | None = None
    xpu: str | None = None

    @property
    def kind(self) -> str:
        """For people: what was built."""
        kinds = (("CUDA", self.cuda), ("ROCm", self.hip), ("XPU", self.xpu))
        article = {"XPU": "an"}
        return next((f"{article.get(n, 'a')} {n} {version} build" for n, version in kinds if version), "a CPU build")


def installed_version(distribution: str) -> str | None:
    """Of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_torch() -> TorchBuild | None:
    """Of the torch that an import would bring; None if there is none."""
    try:
        found = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return read_torch(Path(str(found.locate_file("torch/version.py"))), found.version)


def read_torch(version_file: Path, version: str) -> TorchBuild:
    """From the file that torch's own build writes: assignments of texts, or of None."""
    text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
    found = dict(re.findall(r"^(__version__|cuda|hip|xpu)\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE))
    return TorchBuild(
        version=found.get("__version__", version), cuda=found.get("cuda"), hip=found.get("hip"), xpu=found.get("xpu")
    )


def wrong_torch(build: TorchBuild | None, kind: str) -> str | None:
    """Why this torch cannot use devices of the kind "CUDA", "ROCm" or "XPU"; None if it can."""
    remedy = f"install PyTorch's {kind} build (its web site shows the command under Get Started)"
    if build is None:
        return f"torch is not installed; {remedy}"
    toolkit = {"CUDA": build.cuda, "ROCm": build.hip, "XPU": build.xpu}[kind]
    return None if toolkit else f"torch {build.version} is {build.kind}; {remedy}"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (535, 104) of "535.104-rc1"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def load_or_reason(load: Load, module: str) -> tuple[Any, str]:
    """The module and "", or None and why it cannot be imported."""
    try:
        return load(module), ""
    except Exception as error:  # built for another torch, most often: whatever it raises is the reason
        return None, f"cannot be imported: {' '.join(str(error).split()):.200}"


def told(version: Version, distributions: tuple[str, ...]) -> str:
    """What of the optional libraries is installed, for a device's description."""
    found = [f"with {name} {own}" for name in distributions if (own := version(name)) is not None]
    missing = [name for name in distributions if version(name) is None]
    return ", ".join([*found, *([f"without {' and '.join(missing)}"] if missing else [])])
