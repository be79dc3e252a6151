"""Registers the CPU; imports no torch."""

import platform as host
from typing import TYPE_CHECKING

from fairlead.interface import PLATFORM_API, Device, PlatformSpec, hookimpl
from fairlead_cpu import memory, native, topology

if TYPE_CHECKING:
    from fairlead.interface import Platform


def probe() -> tuple[Device, ...] | str:
    """The host's processors as one device; the description names the kernels' instruction set and threads."""
    kernels = native.choose() or "none: built without"
    description = f"{host.machine()}, kernels {kernels}, {topology.layout()}"
    return (Device(name="cpu:0", description=description, memory_bytes=memory.info().total_bytes),)


def create(device: Device) -> "Platform":
    """Imports torch and makes the platform."""
    from fairlead_cpu.platform import CpuPlatform

    return CpuPlatform(device)


# Torch's OpenMP threads spin while they wait for each other, for milliseconds by default. A server's HTTP process is
# on the same cores, and when it (or anything else) holds one, every spin is lost: with a busy neighbour a decode step
# of 64 sequences of the demo took 564 ms by default and 24 ms so; on an idle machine 9.8 and 10.7 ms.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}

# On two cores with 20 clients a seat, a refusal took 30 to 70 ms in the worst of 100 cases at 0 and 9 to 21 ms so
# (22 at 1, 20 at 3, where it took 9 at 5), at the same throughput: the front end needs little, but at once.
NICENESS = 5


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    """The CPU, the platform of last resort: priority 0."""
    return [
        PlatformSpec(
            name="cpu",
            api_version=PLATFORM_API,
            priority=0,
            probe=probe,
            create=create,
            environment=ENVIRONMENT,
            niceness=NICENESS,
        )
    ]
