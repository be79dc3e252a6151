"""The null platform: a device that takes shapes and gives shapes, and does no arithmetic.

For tests of schedulers, servers and plugins' neighbours, which want the real engine without its time. Every result is
zeros of the right shape and dtype, so each logit is 0: greedy decoding gives token 0 for ever, and sampling any token.
This module is the plugin: an entry point `null = "fairlead.testing.null"` of the group `fairlead.platforms` makes it
known. Its priority is below that of every real device, so that it only runs where it is asked for.

Shapes: T packed tokens, N rows, H query heads, K kv-heads, D head size, E model width, S sequences, V vocabulary.
"""

from typing import TYPE_CHECKING

from fairlead.interface import PLATFORM_API, Device, PlatformSpec, hookimpl

if TYPE_CHECKING:
    from fairlead.interface import Platform

PRIORITY = -1000
MEMORY_BYTES = 2**34


def probe() -> tuple[Device, ...] | str:
    """Always there."""
    return (Device(name="null:0", description="does no arithmetic", memory_bytes=MEMORY_BYTES),)


def create(device: Device) -> "Platform":
    """Imports torch."""
    from fairlead.testing.null_platform import NullPlatform

    return NullPlatform(device)


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    """The null platform."""
    return [PlatformSpec(name="null", api_version=PLATFORM_API, priority=PRIORITY, probe=probe, create=create)]
