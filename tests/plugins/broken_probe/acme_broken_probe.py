"""Its probe raises, where it should return a reason."""

from fairlead.interface import PLATFORM_API, Device, Platform, PlatformSpec, hookimpl


def probe() -> tuple[Device, ...] | str:
    raise OSError("the driver answered\nwith code 42")


def create(device: Device) -> Platform:
    raise AssertionError("a platform without devices is never created")


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    return [PlatformSpec(name="broken_probe", api_version=PLATFORM_API, priority=80, probe=probe, create=create)]
