"""Prints each native CPU kernel's achieved share of its ceiling, measured in the same run, at the shapes of the models.

    python benchmarks/kernels.py                                 # all three models: half an hour
    python benchmarks/kernels.py --models smol135m --rounds 5

One command for cpu_kernels.py (matmuls of every scheme), cpu_attention.py and cpu_elementwise.py; each can be run alone
and takes more options. What each calls its ceiling stands at its top.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smol135m,qwen05b,llama1b")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rows", default="1,8,64,512")
    args = parser.parse_args()
    status = 0
    for model in args.models.split(","):
        rounds, rows = ["--rounds", str(args.rounds)], ["--rows", args.rows]
        for script, options in (
            ("cpu_kernels.py", ["--models", model, *rounds, *rows]),
            ("cpu_attention.py", ["--model", model, "--repetitions", str(args.rounds)]),
            ("cpu_elementwise.py", ["--models", model, *rounds, *rows]),
        ):
            print(f"== {model}: {script}", flush=True)
            status = max(status, abs(subprocess.run([sys.executable, str(HERE / script), *options]).returncode))
    return status


if __name__ == "__main__":
    sys.exit(main())
