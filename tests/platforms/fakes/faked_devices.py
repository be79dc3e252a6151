"""A plugin whose devices are fake ones under the real platforms' code; imports no torch before one is created.

The kit runs it as it would run the real plugin on a machine with the hardware.
"""

import os
from typing import TYPE_CHECKING

from fairlead.interface import PLATFORM_API, Device, PlatformSpec, hookimpl

if TYPE_CHECKING:
    from fairlead.interface import Platform

GIB = 2**30


def create(device: Device) -> "Platform":
    from fake_platforms import make

    # A replay knows torch's operations alone: with interpreted kernels in them, steps run as they come.
    return make(device.name.partition(":")[0], device, graphs=os.environ.get("FAKED_GRAPHS") != "0")


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    """One device of each."""
    return [
        PlatformSpec(
            name=name,
            api_version=PLATFORM_API,
            priority=priority,
            probe=lambda name=name: (Device(name=f"{name}:0", description="a fake device", memory_bytes=4 * GIB),),
            create=create,
        )
        for name, priority in (("cuda", 100), ("rocm", 90), ("xpu", 80))
    ]
