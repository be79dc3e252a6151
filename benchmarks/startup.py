"""Prints how long the commands that only inform take, and how much of it the interpreter itself needs.

    python benchmarks/startup.py

Aim: `import fairlead` and `fairlead --help` in under 0.7 s.
"""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import fairlead": ["-c", "import fairlead"],
    "fairlead --help": ["-m", "fairlead_server.cli", "--help"],
    "fairlead serve --help": ["-m", "fairlead_server.cli", "serve", "--help"],
    "fairlead platforms": ["-m", "fairlead_server.cli", "platforms"],
    "import torch": ["-c", "import torch"],
}
REPETITIONS = 7


def seconds(arguments: list[str]) -> float:
    """Wall time of one run of the interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(REPETITIONS):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    for name, values in times.items():
        print(f"{name:22} {statistics.median(values):6.2f} s")


if __name__ == "__main__":
    main()
