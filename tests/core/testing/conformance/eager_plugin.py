"""Imports torch when it is registered: every `fairlead platforms` would wait for that."""

import torch

from fairlead.interface import PLATFORM_API, Device, Platform, PlatformSpec, hookimpl


def probe() -> tuple[Device, ...] | str:
    return (Device(name="eager:0", description=f"with torch {torch.__version__}", memory_bytes=2**40),)


def create(device: Device) -> Platform:
    from fairlead_cpu.platform import CpuPlatform

    return CpuPlatform(device)


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    return [PlatformSpec(name="eager", api_version=PLATFORM_API, priority=-60, probe=probe, create=create)]
