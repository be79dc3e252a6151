"""`fairlead serve` over the fake engine, as a process of its own: the arguments are the command's."""

import sys
from pathlib import Path
from unittest import mock

from fairlead.engine import connection
from fairlead_server import cli

FAKE_ENGINE = (sys.executable, "-P", str(Path(__file__).with_name("fake_engine.py")))

if __name__ == "__main__":
    with mock.patch.object(connection, "COMMAND", FAKE_ENGINE):
        cli.main(["serve", *sys.argv[1:]])
