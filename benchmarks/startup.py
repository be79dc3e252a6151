"""Prints how long a process takes from its start to the end of a command, or to a model's first token.

    python benchmarks/startup.py [CHECKPOINT ...]

Aims: `import fairlead` and `fairlead --help` in under 0.7 s; the first token of the demo at most 0.5 s after what
`import torch` takes, of a model of 135 million parameters 1.0 s. Commands take turns; medians.
"""

import argparse
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
FIRST_TOKEN = """
import sys, fairlead
llm = fairlead.LLM(sys.argv[1], skip_tokenizer_init=True)
next(llm.generate_stream([1, 2, 3], fairlead.SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)))
"""
REPETITIONS = 7


def seconds(arguments: list[str]) -> float:
    """Wall time of one run of the interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="beside the demo")
    asked = parser.parse_args().checkpoints
    commands = COMMANDS | {f"first token of {name}": ["-c", FIRST_TOKEN, name] for name in ("demo", *asked)}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(REPETITIONS):
        for name, arguments in commands.items():
            times[name].append(seconds(arguments))
    for name, values in times.items():
        print(f"{name:30} {statistics.median(values):6.2f} s")


if __name__ == "__main__":
    main()
