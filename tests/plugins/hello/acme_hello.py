"""Registers the hello accelerator: the smallest platform that serves."""

from fairlead.interface import Device, Platform, PlatformSpec, hookimpl


def probe() -> tuple[Device, ...] | str:
    """One device."""
    return (Device(name="hello:0", description="Acme Hello", memory_bytes=1 << 30),)


def create(device: Device) -> Platform:
    """Torch enters here."""
    from acme_hello_platform import HelloPlatform

    return HelloPlatform(device)


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    """Below the CPU: only where it was asked for."""
    return [PlatformSpec(name="hello", api_version="1.0", priority=-30, probe=probe, create=create)]
