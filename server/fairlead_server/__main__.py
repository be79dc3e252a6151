"""`python -m fairlead_server …` is `fairlead serve …`."""

import sys

from fairlead_server.cli import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
