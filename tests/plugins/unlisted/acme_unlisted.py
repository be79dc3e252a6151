"""Valid, and leaves a file behind when it is imported: the one that ACME_MARKER names."""

import os
from pathlib import Path

from fairlead.interface import PLATFORM_API, Device, Platform, PlatformSpec, hookimpl

if "ACME_MARKER" in os.environ:
    Path(os.environ["ACME_MARKER"]).touch()


def probe() -> tuple[Device, ...] | str:
    return (Device(name="unlisted:0", description="Acme Quiet", memory_bytes=1 << 30),)


def create(device: Device) -> Platform:
    raise RuntimeError(f"the firmware of {device.description} is too old")


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    return [PlatformSpec(name="unlisted", api_version=PLATFORM_API, priority=-10, probe=probe, create=create)]
