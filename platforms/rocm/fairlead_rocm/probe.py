"""Which AMD devices are usable here, and why not, from the kernel driver's own tree. Opens none; imports no torch.

Source: Linux, drivers/gpu/drm/amd/amdkfd/kfd_topology.c (properties of nodes and of their memory banks).
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fairlead.interface import Device
from fairlead_triton.device.libraries import TorchBuild, Version, installed_torch, installed_version, told, wrong_torch
from fairlead_triton.device.visible import hidden, selection, visible

LIBRARIES = ("amd-aiter",)
NODES = "sys/class/kfd/kfd/topology/nodes"
_DEVICE_MEMORY = (1, 2)  # heap types of a bank: the device's own, visible to the host or not


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the probe reads; a test hands in another one."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    torch: Callable[[], TorchBuild | None] = installed_torch
    version: Version = installed_version
    can_open: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device. `arch` is a name such as "gfx942", `wave_size` the lanes of a wave, `lds_bytes` the memory that a
    work-group shares."""

    name: str
    uuid: str
    arch: str
    memory_bytes: int
    wave_size: int
    lds_bytes: int


def probe(machine: Machine | None = None) -> tuple[Device, ...] | str:
    """The usable devices in the order of torch's numbers, or why there are none."""
    machine = machine or Machine()
    reason = _no_driver(machine)
    if reason is not None:
        return reason
    gpus = read_gpus(machine.root)
    if not gpus:
        return f"the amdgpu driver is loaded, but has no device that computes (/{NODES})"
    reason = wrong_torch(machine.torch(), "ROCm")
    if reason is not None:
        return f"{_describe(gpus)}, but {reason}"
    for variable in _variables(machine.environment):
        before = gpus
        gpus, stopped_at = visible(selection(machine.environment, variable), gpus, lambda gpu: gpu.uuid)
        if not gpus:
            return hidden(variable, machine.environment[variable], stopped_at, len(before))
    libraries = told(machine.version, LIBRARIES)
    return tuple(
        Device(name=f"rocm:{i}", description=f"{gpu.name}, {gpu.arch}, {libraries}", memory_bytes=gpu.memory_bytes)
        for i, gpu in enumerate(gpus)
    )


def diagnose(machine: Machine | None = None) -> tuple[str, ...]:
    """What is wrong where there is a device: with the rights to it, or with the torch that should use it."""
    machine = machine or Machine()
    return tuple(_complaints(machine))


def _complaints(machine: Machine) -> Iterator[str]:
    gpus = read_gpus(machine.root)
    if not gpus:
        return
    for reason in (_no_driver(machine), wrong_torch(machine.torch(), "ROCm")):
        if reason is not None:
            yield f"{_describe(gpus)}, but {reason}"
    for variable in _variables(machine.environment):
        _, stopped_at = visible(selection(machine.environment, variable), gpus, lambda gpu: gpu.uuid)
        if stopped_at and not stopped_at.startswith("-"):
            value = machine.environment[variable]
            yield f"{variable} is {value!r}: {stopped_at!r} names no device, so it and what follows are ignored"
    if "HSA_OVERRIDE_GFX_VERSION" in machine.environment:
        value = machine.environment["HSA_OVERRIDE_GFX_VERSION"]
        yield f"HSA_OVERRIDE_GFX_VERSION is {value!r}: kernels are built for a device that this one is not; unset it"


def read_gpus(root: Path) -> list[Gpu]:
    """Nodes that compute, in the driver's order; processors are nodes without SIMDs."""
    folder = root / NODES
    nodes = sorted((p for p in folder.glob("*") if p.name.isdigit()), key=lambda p: int(p.name))
    return [gpu for gpu in map(_read_gpu, nodes) if gpu is not None]


def _read_gpu(node: Path) -> Gpu | None:
    values = _properties(node / "properties")
    if not values.get("simd_count") or not values.get("gfx_target_version"):
        return None  # a processor, or a device of another control group, whose values are hidden
    banks = [_properties(bank) for bank in sorted(node.glob("mem_banks/*/properties"))]
    memory = sum(b.get("size_in_bytes", 0) for b in banks if b.get("heap_type") in _DEVICE_MEMORY)
    name = _text(node / "name")
    arch = arch_of(values["gfx_target_version"])
    return Gpu(
        name=name or arch,
        uuid=f"GPU-{values.get('unique_id', 0):016x}",
        arch=arch,
        memory_bytes=memory or 1,
        wave_size=values.get("wave_front_size", 64),
        lds_bytes=values.get("lds_size_in_kb", 64) * 1024,
    )


def arch_of(target_version: int) -> str:
    """ "gfx90a" of 90010: major version, two digits of minor, two of stepping, which the name writes in hexadecimal."""
    major, minor, step = target_version // 10000, target_version // 100 % 100, target_version % 100
    return f"gfx{major}{minor:x}{step:x}"


def _variables(environment: Mapping[str, str]) -> list[str]:
    """Those that are set, in the order in which they apply: HIP numbers what ROCR leaves."""
    hip = "HIP_VISIBLE_DEVICES" if "HIP_VISIBLE_DEVICES" in environment else "CUDA_VISIBLE_DEVICES"
    return [name for name in ("ROCR_VISIBLE_DEVICES", hip) if name in environment]


def _no_driver(machine: Machine) -> str | None:
    if not (machine.root / NODES).is_dir():
        return f"no AMD driver: there is no /{NODES}"
    device = machine.root / "dev/kfd"
    if not device.exists():
        return "there is no /dev/kfd; in a container, give it with --device=/dev/kfd --device=/dev/dri"
    if not machine.can_open(device):
        return "/dev/kfd may not be opened; add this user to the groups render and video"
    return None


def _describe(gpus: list[Gpu]) -> str:
    return f"there {'is' if len(gpus) == 1 else 'are'} {', '.join(f'{gpu.name} ({gpu.arch})' for gpu in gpus)}"


def _properties(file: Path) -> dict[str, int]:
    """Lines of a name and a number; nothing where they may not be read."""
    pairs = (line.split() for line in _text(file).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
