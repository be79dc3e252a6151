"""Registers AMD's devices; imports neither torch nor a driver."""

from typing import TYPE_CHECKING

from fairlead.interface import PLATFORM_API, Device, PlatformSpec, hookimpl
from fairlead_rocm import probe

if TYPE_CHECKING:
    from fairlead.interface import Platform


def create(device: Device) -> "Platform":
    """Imports torch and makes the platform."""
    from fairlead_rocm.platform import RocmPlatform

    return RocmPlatform.on(device)


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    """Before the CPU, wherever there is a device."""
    return [
        PlatformSpec(
            name="rocm",
            api_version=PLATFORM_API,
            priority=90,
            probe=probe.probe,
            create=create,
            diagnose=probe.diagnose,
        )
    ]
