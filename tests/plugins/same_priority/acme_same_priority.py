"""Brings two platforms that are both there and have the same priority."""

from fairlead.interface import PLATFORM_API, Device, Platform, PlatformSpec, hookimpl


def probe() -> tuple[Device, ...] | str:
    return (Device(name="acme:0", description="Acme One", memory_bytes=1 << 30),)


def create(device: Device) -> Platform:
    raise AssertionError("no test creates it")


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    return [
        PlatformSpec(name=name, api_version=PLATFORM_API, priority=50, probe=probe, create=create)
        for name in ("acme_left", "acme_right")
    ]
