"""Was written for a contract that this core does not have."""

from fairlead.interface import Device, Platform, PlatformSpec, hookimpl


def probe() -> tuple[Device, ...] | str:
    raise AssertionError("a plugin of the wrong version is never probed")


def create(device: Device) -> Platform:
    raise AssertionError("a plugin of the wrong version is never created")


@hookimpl
def fairlead_platforms() -> list[PlatformSpec]:
    return [PlatformSpec(name="wrong_version", api_version="2.0", priority=90, probe=probe, create=create)]
