"""Registration in a process of its own. No torch."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

from fairlead import plugins

_IMPORT_S = 30
_CODE = "import sys; from fairlead.plugins import discover; discover(); sys.exit(7 if 'torch' in sys.modules else 0)"


def imports_torch(distribution: str) -> bool:
    """Whether listing the plugins of a distribution imports torch, or fails."""
    found = entry_points(group=plugins.ENTRY_POINT_GROUP)
    ours = [e.name for e in found if e.dist is not None and e.dist.name == distribution]
    environment = os.environ | {plugins.ALLOWLIST_VARIABLE: ",".join(ours)}
    done = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, timeout=_IMPORT_S)
    return done.returncode != 0
