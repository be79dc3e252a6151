"""Says why it has no device."""

from fairlead.interface import PLATFORM_API, Device, Platform, PlatformSpec, hookimpl


def probe() -> tuple[Device, ...] | str:
    return "there is no /dev/acme0; is the driver loaded?"


def create(device: Device) -> Platform:
    raise AssertionError("a platform without devices is never created")


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    return [PlatformSpec(name="no_device", api_version=PLATFORM_API, priority=70, probe=probe, create=create)]
