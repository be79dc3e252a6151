"""Its hook forgets to return."""

from fairlead.interface import PlatformSpec, hookimpl


@hookimpl
def fairlead_platforms() -> list[PlatformSpec] | None:
    return None
