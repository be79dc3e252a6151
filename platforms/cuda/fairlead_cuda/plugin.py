"""Registers NVIDIA's devices; imports neither torch nor a driver."""

from typing import TYPE_CHECKING

from fairlead.interface import PLATFORM_API, Device, PlatformSpec, hookimpl
from fairlead_cuda import probe

if TYPE_CHECKING:
    from fairlead.interface import Platform


def create(device: Device) -> "Platform":
    """Imports torch and makes the platform."""
    from fairlead_cuda.platform import CudaPlatform

    return CudaPlatform.on(device)


# By default CUDA numbers devices by speed, and NVML by their place on the bus: with this both do as NVML does.
ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    """Before the CPU, wherever there is a device."""
    return [
        PlatformSpec(
            name="cuda",
            api_version=PLATFORM_API,
            priority=100,
            probe=probe.probe,
            create=create,
            environment=ENVIRONMENT,
            diagnose=probe.diagnose,
        )
    ]
