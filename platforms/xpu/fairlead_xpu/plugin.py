"""Registers Intel's GPUs; imports neither torch nor a driver."""

from typing import TYPE_CHECKING

from fairlead.interface import PLATFORM_API, Device, PlatformSpec, hookimpl
from fairlead_xpu import probe

if TYPE_CHECKING:
    from fairlead.interface import Platform


def create(device: Device) -> "Platform":
    """Imports torch and makes the platform."""
    from fairlead_xpu.platform import XpuPlatform

    return XpuPlatform.on(device)


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    """Before the CPU, wherever there is a device."""
    return [
        PlatformSpec(
            name="xpu",
            api_version=PLATFORM_API,
            priority=80,
            probe=probe.probe,
            create=create,
            diagnose=probe.diagnose,
        )
    ]
