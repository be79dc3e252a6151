"""The same tests under `python -O`: what is refused must be refused without `assert`.

pytest rewrites the assertions of the tests, so these still hold there; ours are gone, in the engine's process, too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
QUICK = ("server/test_protocol.py", "core/test_config.py", "core/test_request.py")  # no server: -O compiles all anew
FULL = ("server", "core/test_checkpoint.py", "core/test_config.py", "core/test_plugins.py", "core/test_request.py")


@pytest.mark.timeout(3600)
def test_nothing_hangs_on_an_assert(full: bool) -> None:
    which = [str(TESTS / name) for name in (FULL if full else QUICK)]
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--deselect={__file__}"]
    command += ["-W", "ignore:assertions not in test modules or plugins will be ignored:pytest.PytestConfigWarning"]
    command += ["-p", "pytest_timeout", "--ignore", str(Path(__file__).parent / "clients")]
    done = subprocess.run(
        [*command, *which], capture_output=True, text=True, check=False, env=environment(), cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]


def environment() -> dict[str, str]:
    """Of processes that run under -O as do those that they start, and that no worker of pytest-xdist claims."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return kept | {"PYTHONOPTIMIZE": "1", "FAIRLEAD_TEST_FULL": "0", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
