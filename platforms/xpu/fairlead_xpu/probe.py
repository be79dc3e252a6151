"""Which Intel GPUs are usable here, and why not, from the kernel's tree. Opens none; imports no torch."""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fairlead.interface import Device
from fairlead_triton.device.libraries import (
    TorchBuild,
    Version,
    installed_torch,
    installed_version,
    numbers,
    wrong_torch,
)
from fairlead_triton.device.visible import hidden, selection

VARIABLE = "ZE_AFFINITY_MASK"
LOADER = "libze_loader.so.1"
IPEX = "intel-extension-for-pytorch"
_VENDOR, _DISPLAY_CLASS, _DRIVERS = "0x8086", "0x03", ("i915", "xe")
_PREFETCHABLE = 0x2000  # a flag in sysfs' resource file (linux/ioport.h, IORESOURCE_PREFETCH)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the probe reads; a test hands in another one."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    load: Callable[[str], Any] = ctypes.CDLL
    torch: Callable[[], TorchBuild | None] = installed_torch
    version: Version = installed_version
    can_open: Callable[[Path], bool] = lambda path: os.access(path, os.R_OK | os.W_OK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device: its PCI address and number there, and the nodes through which it is used."""

    address: str
    pci_id: str
    driver: str
    memory_bytes: int
    nodes: tuple[Path, ...]


def probe(machine: Machine | None = None) -> tuple[Device, ...] | str:
    """The usable devices in the order of torch's numbers, or why there are none."""
    machine = machine or Machine()
    gpus = read_gpus(machine.root)
    reason = _no_device(machine, gpus)
    if reason is not None:
        return reason
    there = len(gpus)
    gpus, stopped_at = _visible(machine.environment, gpus)
    if not gpus:
        return hidden(VARIABLE, machine.environment.get(VARIABLE, ""), stopped_at, there)
    why_not = ipex_reason(machine.version, machine.torch())
    extension = f"with {IPEX}" if why_not is None else f"IPEX is not used: {why_not}"
    return tuple(
        Device(
            name=f"xpu:{i}",
            description=f"Intel GPU {gpu.pci_id} at {gpu.address}, driver {gpu.driver}; {extension}",
            memory_bytes=gpu.memory_bytes,
        )
        for i, gpu in enumerate(gpus)
    )


def diagnose(machine: Machine | None = None) -> tuple[str, ...]:
    """What is wrong where there is a device: with the rights to it, the loader, the torch, or IPEX."""
    machine = machine or Machine()
    return tuple(_complaints(machine))


def _complaints(machine: Machine) -> Iterator[str]:
    gpus = read_gpus(machine.root)
    if gpus:
        reason = _no_device(machine, gpus)
        if reason is not None:
            yield reason
    if machine.version(IPEX) is not None:
        why_not = ipex_reason(machine.version, machine.torch())
        if why_not is not None:
            yield f"{IPEX} is installed, but is not used: {why_not}"


def ipex_reason(version: Version, build: TorchBuild | None) -> str | None:
    """Why Intel's extension cannot be imported beside this torch; None if it can. It wants torch of its own version."""
    own = version(IPEX)
    if own is None:
        return f"{IPEX} is not installed (pip install 'fairlead-xpu[ipex]', for torch 2.8)"
    if build is None or numbers(build.version)[:2] != numbers(own)[:2]:
        wanted = ".".join(map(str, numbers(own)[:2]))
        found = "none" if build is None else build.version
        return f"{IPEX} {own} needs torch {wanted}, found {found}; 2.8 is its last release"
    return None


def read_gpus(root: Path) -> list[Gpu]:
    """Cards of this maker with a driver that computes, by PCI address."""
    cards = (p for p in (root / "sys/class/drm").glob("card*") if p.name[4:].isdigit())
    found = [gpu for gpu in (_read_gpu(root, card) for card in cards) if gpu is not None]
    return sorted(found, key=lambda gpu: gpu.address)


def _read_gpu(root: Path, card: Path) -> Gpu | None:
    device = card / "device"
    driver = (device / "driver").resolve().name
    if _text(device / "vendor") != _VENDOR or not _text(device / "class").startswith(_DISPLAY_CLASS):
        return None
    if driver not in _DRIVERS:
        return None
    nodes = tuple(root / "dev/dri" / p.name for p in sorted((device / "drm").glob("renderD*")))
    own = _text(card / "lmem_total_bytes")
    memory = int(own) if own.isdigit() else _largest_window(device / "resource")
    return Gpu(
        address=device.resolve().name,
        pci_id=_text(device / "device").removeprefix("0x"),
        driver=driver,
        memory_bytes=max(memory, _host_bytes(root)) if memory < 2**30 else memory,
        nodes=nodes,
    )


def _largest_window(resource: Path) -> int:
    """The largest prefetchable range of the PCI device: its memory, where the whole of it is mapped (resizable BAR)."""
    sizes = [0]
    for line in _text(resource).splitlines():
        start, end, flags = (int(word, 16) for word in line.split()[:3])
        if flags & _PREFETCHABLE:
            sizes.append(end - start + 1)
    return max(sizes)


def _host_bytes(root: Path) -> int:
    """The host's memory, which is that of an integrated device."""
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 1


def _no_device(machine: Machine, gpus: list[Gpu]) -> str | None:
    if not gpus:
        drivers = " or ".join(_DRIVERS)
        return f"no Intel GPU: no card under /sys/class/drm is Intel's with the driver {drivers}"
    there = f"there {'is' if len(gpus) == 1 else 'are'} {len(gpus)} Intel GPU{'s' if len(gpus) != 1 else ''}"
    nodes = [node for gpu in gpus for node in gpu.nodes if node.exists()]
    if not nodes:
        return f"{there}, but no /dev/dri/renderD*; in a container, give it with --device=/dev/dri"
    if not any(machine.can_open(node) for node in nodes):
        return f"{there}, but /dev/dri/{nodes[0].name} may not be opened; add this user to the group render"
    try:
        machine.load(LOADER)
    except OSError:
        return f"{there}, but {LOADER} is not found; install the level-zero loader and Intel's compute runtime"
    reason = wrong_torch(machine.torch(), "XPU")
    return None if reason is None else f"{there}, but {reason}"


def _visible(environment: Mapping[str, str], gpus: list[Gpu]) -> tuple[list[Gpu], str | None]:
    """The mask lists devices, or tiles of devices as DEVICE.TILE; a device is there if any of its tiles is."""
    entries = selection(environment, VARIABLE)
    if entries is None:
        return gpus, None
    chosen: list[Gpu] = []
    for entry in entries:
        number = entry.partition(".")[0]
        if not number.isdigit() or int(number) >= len(gpus):
            return chosen, entry
        if gpus[int(number)] not in chosen:
            chosen.append(gpus[int(number)])
    return chosen, None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
