"""The command `fairlead`: says in one line which package is missing, where the command line cannot even be read."""

import sys
from typing import NoReturn

from fairlead.errors import FairleadError, MissingDependencyError


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a command line and exits, as `fairlead_server.cli.main` does."""
    try:
        from fairlead_server import cli
    except ModuleNotFoundError as missing:
        try:
            raise MissingDependencyError.of("the command line", missing) from missing
        except FairleadError as error:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    cli.main(arguments)
