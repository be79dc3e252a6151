"""Registers the toy; imports no torch."""

from importlib import metadata
from typing import TYPE_CHECKING

from fairlead.interface import Device, PlatformSpec, hookimpl

if TYPE_CHECKING:
    from fairlead.interface import Platform

OLDEST_TORCH = (2, 11)
MEMORY_BYTES = 1 << 30


def probe() -> tuple[Device, ...] | str:
    """One device, where torch can register a backend from Python."""
    version = metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {version} cannot register a device from Python; install torch 2.11 or later"
    return (Device(name="toy:0", description="Acme Toy", memory_bytes=MEMORY_BYTES),)


def create(device: Device) -> "Platform":
    """Imports torch and makes the platform."""
    from acme_toy.platform import ToyPlatform

    return ToyPlatform(device)


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    """Below the CPU: the toy runs only where it was asked for."""
    return [PlatformSpec(name="toy", api_version="1.0", priority=-20, probe=probe, create=create)]
