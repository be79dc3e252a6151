"""Measures an accelerator platform: against its own ceilings, float32 references, and transformers on the same card.

    python benchmarks/gpu/run.py --platform cuda --out gpu-results            # every step, then the report
    python benchmarks/gpu/run.py --steps decode,prefill --out gpu-results     # some; cases that are done are kept
    python benchmarks/gpu/run.py --steps report --out gpu-results             # the report alone
    python benchmarks/gpu/run.py --platform cpu --tiny --one-process --out dry-run   # a dry run

Each step ends within --step-seconds (below 8 minutes); what it had no time for is named, and done by the next run with
the same --out. See README.md beside this file.
"""

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpubench import report

if TYPE_CHECKING:
    from gpubench.harness import Settings

GRACE_S = 25  # a case that has begun may end, before its process is


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", default="cuda")
    parser.add_argument("--steps", default=",".join((*report.STEPS, "report")))
    parser.add_argument("--groups", help="of these steps, such as llama8b; all of them if not given")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--step-seconds", type=float, default=440.0)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a dry run, whose figures mean nothing")
    parser.add_argument("--one-process", action="store_true", help="none for each group: quicker where it is tiny")
    parser.add_argument("--group", help=argparse.SUPPRESS)  # run this one in this process
    args = parser.parse_args()
    steps = args.steps.split(",")
    unknown = [step for step in steps if step not in (*report.STEPS, "report")]
    if unknown:
        parser.error(f"there is no step {unknown[0]!r}; the steps are: {', '.join((*report.STEPS, 'report'))}")
    if args.group is not None:
        run_group(args, steps[0], args.group, time.monotonic() + args.step_seconds)
        return 0
    statuses = [run_step(args, step) for step in steps if step != "report"]
    if "report" in steps:
        print(report.write(args.out).read_text(encoding="utf-8"))
    return max(statuses, default=0)


def run_step(args: argparse.Namespace, step: str) -> int:
    """All groups of a step, each in a process of its own, so that the card's memory is free again after each."""
    deadline = time.monotonic() + args.step_seconds
    status = 0
    for group in groups_of(step, args.groups):
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"{step}: no time was left for {group}; run it again with the same --out")
        elif args.one_process:
            run_group(args, step, group, deadline)
        else:
            command = [sys.executable, __file__, "--steps", step, "--group", group, "--step-seconds", str(left)]
            command += ["--platform", args.platform, "--dtype", args.dtype, "--out", str(args.out)]
            command += ["--tiny"] * args.tiny
            try:
                status = max(status, abs(subprocess.run(command, timeout=left + GRACE_S).returncode))
            except subprocess.TimeoutExpired:
                print(f"{step}: {group} was ended after {left + GRACE_S:.0f} s; what it had measured is kept")
    return status


def groups_of(step: str, wanted: str | None) -> list[str]:
    """The groups of a step, or those of them that were asked for."""
    names = list(importlib.import_module(f"gpubench.{step}").GROUPS)
    return names if wanted is None else [name for name in names if name in wanted.split(",")]


def run_group(args: argparse.Namespace, step: str, group: str, deadline: float) -> None:
    """Runs the cases of a group that are not done, in this process."""
    from gpubench import harness

    settings: Settings = harness.Settings(
        platform=args.platform, out=args.out, is_tiny=args.tiny, dtype=args.dtype, deadline=deadline
    )
    module: Any = importlib.import_module(f"gpubench.{step}")
    results = harness.Results(args.out, step)
    results.begin(harness.environment(harness.Card(settings)))
    left_over = harness.run_cases(results, module.cases(settings, group), deadline)
    if left_over:
        print(f"{step}: no time was left for {'; '.join(left_over)}; run it again with the same --out")


if __name__ == "__main__":
    sys.exit(main())
