"""Every hook that a plugin may implement: one signature and one sentence each."""

import pluggy

from fairlead.interface.spec import PlatformSpec

hookspec = pluggy.HookspecMarker("fairlead")


@hookspec
def fairlead_platforms() -> list[PlatformSpec]:
    """Returns the platforms that this plugin brings; cheap, importing neither torch nor a driver."""
    raise AssertionError("a hook specification is never called")


@hookspec
def fairlead_models() -> dict[str, str]:
    """Returns the model classes that this plugin brings, architecture to "module:Class"; cheap, importing none."""
    raise AssertionError("a hook specification is never called")
