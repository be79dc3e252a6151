"""Which NVIDIA devices are usable here, and why not. Initialises none; imports no torch."""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairlead.interface import Device
from fairlead_cuda.nvml import Driver, Gpu, NvmlError, read_driver, read_instances
from fairlead_triton.device.libraries import (
    TorchBuild,
    Version,
    installed_torch,
    installed_version,
    numbers,
    told,
    wrong_torch,
)
from fairlead_triton.device.visible import hidden, selection, visible

VARIABLE = "CUDA_VISIBLE_DEVICES"
LIBRARIES = ("flashinfer-python", "flash-attn")
MIN_CAPABILITY = (7, 5)
"""Of Triton's code generator; older devices compute with nothing of ours."""

# The first driver of each major version of CUDA: within one, every driver runs what any minor version has built.
# Source: CUDA Compatibility, table "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version
# Compatibility".
_FIRST_DRIVER = {11: "450", 12: "525", 13: "580"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the probe reads; a test hands in another one."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    load: Callable[[str], Any] = ctypes.CDLL
    torch: Callable[[], TorchBuild | None] = installed_torch
    version: Version = installed_version


def probe(machine: Machine | None = None) -> tuple[Device, ...] | str:
    """The usable devices in the order of torch's numbers, or why there are none."""
    machine = machine or Machine()
    try:
        driver = read_driver(machine.load)
    except NvmlError as error:
        return _no_driver(machine, str(error))
    build = machine.torch()
    reason = wrong_torch(build, "CUDA") or _too_old(driver, build)
    if reason is not None:
        return f"{_describe(driver)}, but {reason}"
    try:
        gpus, stopped_at = _visible(machine, driver)
    except NvmlError as error:
        return f"{VARIABLE} is {machine.environment[VARIABLE]!r}, but {error}"
    if not gpus:
        if not driver.gpus:
            return f"driver {driver.version} finds no device"
        return hidden(VARIABLE, machine.environment.get(VARIABLE, ""), stopped_at, len(driver.gpus))
    usable = [(i, gpu) for i, gpu in enumerate(gpus) if gpu.capability >= MIN_CAPABILITY]
    if not usable:
        found = ", ".join(f"{gpu.name} ({_dotted(gpu.capability)})" for gpu in gpus)
        return f"compute capability {_dotted(MIN_CAPABILITY)} or newer is needed, found: {found}"
    rest = f"driver {driver.version}, {told(machine.version, LIBRARIES)}"
    return tuple(
        Device(
            name=f"cuda:{i}",
            description=f"{gpu.name}, compute capability {_dotted(gpu.capability)}, {rest}",
            memory_bytes=gpu.memory_bytes,
        )
        for i, gpu in usable
    )


def diagnose(machine: Machine | None = None) -> tuple[str, ...]:
    """What is wrong where a driver is there: with it, or with the torch that should use it."""
    machine = machine or Machine()
    return tuple(_complaints(machine))


def _complaints(machine: Machine) -> Iterator[str]:
    try:
        driver = read_driver(machine.load)
    except NvmlError as error:
        if _has_module(machine.root):
            yield _no_driver(machine, str(error))
        return
    build = machine.torch()
    reason = wrong_torch(build, "CUDA") or _too_old(driver, build)
    if reason is not None and driver.gpus:
        yield f"{_describe(driver)}, but {reason}"
    for i, gpu in enumerate(driver.gpus):
        if gpu.capability < MIN_CAPABILITY:
            least = _dotted(MIN_CAPABILITY)
            yield f"device {i} ({gpu.name}) has compute capability {_dotted(gpu.capability)}; {least} is the least"
    entries = selection(machine.environment, VARIABLE)
    if entries is not None and not any(entry.startswith("MIG-") for entry in entries):
        _, stopped_at = visible(entries, driver.gpus, lambda gpu: gpu.uuid)
        if stopped_at and not stopped_at.startswith("-"):
            value = machine.environment[VARIABLE]
            yield f"{VARIABLE} is {value!r}: {stopped_at!r} names no device, so it and what follows are ignored"


def _visible(machine: Machine, driver: Driver) -> tuple[list[Gpu], str | None]:
    entries = selection(machine.environment, VARIABLE)
    parts = [entry for entry in entries or () if entry.startswith("MIG-")]
    if parts:
        return list(read_instances(parts, machine.load)), None
    return visible(entries, driver.gpus, lambda gpu: gpu.uuid)


def _no_driver(machine: Machine, error: str) -> str:
    if not _has_module(machine.root):
        return f"no NVIDIA driver: {error}"
    return (
        f"the NVIDIA kernel driver is loaded, but {error}; in a container, start it with the NVIDIA container toolkit "
        "(--gpus all), else install the driver's libraries of the same version"
    )


def _has_module(root: Path) -> bool:
    return (root / "proc/driver/nvidia/version").exists()


def _too_old(driver: Driver, build: TorchBuild | None) -> str | None:
    """Why this torch cannot run on the driver; None if it can."""
    needed = numbers((build and build.cuda) or "")
    if not needed or driver.cuda[0] >= needed[0]:
        return None
    first = _FIRST_DRIVER.get(needed[0])
    newer = f"update the driver to {first} or newer" if first else "update the driver"
    return (
        f"it runs CUDA up to {_dotted(driver.cuda)}, and torch {build.version if build else ''} was built for "
        f"{_dotted(needed)}: {newer}, or install a torch that was built for CUDA {driver.cuda[0]}"
    )


def _describe(driver: Driver) -> str:
    count = len(driver.gpus)
    return f"driver {driver.version} has {count} device{'s' if count != 1 else ''}"


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version[:2]))
