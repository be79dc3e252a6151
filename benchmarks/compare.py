"""Fairlead beside other engines on the same requests, in turns: W1 to W4 of comparing/workloads.py.

    python benchmarks/compare.py --model smol135m                            # all engines that are there
    python benchmarks/compare.py --engines fairlead,fairlead-int8,vllm --workloads w1
    python benchmarks/compare.py --model tiny --repeats 1 --out dry-run      # proves that it runs; measures nothing

Models are made in --home, where rivals are looked for, too (docs/benchmarks.md says how they get there). Each engine
loads the model once, in a process of its own, and is stopped (SIGSTOP) while another is measured. Repetitions
alternate, medians count. Limits are measured in the same turns, where fairlead-cpu has its kernels: weights over read
bandwidth, and the rate of the instruction that multiplies. Writes compare.json, a plot for each workload, and
compare.md, where the targets of comparing/targets.py stand beside what was measured.
"""

import argparse
import importlib.util
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from comparing import engines, targets, workloads

HERE = Path(__file__).parent
Runs = dict[str, dict[str, list[float]]]
"""By engine and by "workload metric", one figure a repetition."""


class Worker:
    """An engine's process; it stands still but while it works."""

    def __init__(self, engine: str, python: str, model: str, options: dict[str, Any]) -> None:
        command = [python, "-m", "comparing.worker", engine, model, json.dumps(options)]
        environment = os.environ | {"PATH": f"{Path(python).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        self._process = subprocess.Popen(
            command,
            cwd=HERE,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.ready = self._answer()
        self._signal(signal.SIGSTOP)

    def run(self, workload: str, repetition: int) -> dict[str, Any]:
        """The metrics of one run, or {"error": ...}."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"workload": workload, "repetition": repetition}) + "\n")
            self._process.stdin.flush()
            return self._answer()
        except BrokenPipeError:
            return {"error": "the engine's process has ended"}
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """Ends it with all its children."""
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "the engine's process has ended"}
        return found

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=workloads.VOCAB_SIZES, default="smol135m")
    parser.add_argument("--workloads", default=",".join(workloads.NAMES))
    parser.add_argument("--engines", help="of: " + ", ".join(engines.ENGINES) + "; those that are there if not given")
    parser.add_argument(
        "--home", type=lambda text: Path(text).resolve(), default=Path.home() / ".cache" / "fairlead-bench"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("compare-results"))
    args = parser.parse_args()
    from comparing.models import checkpoint

    directory = checkpoint(args.home / "models", args.model)
    asked = args.engines.split(",") if args.engines else engines.present(args.home, args.model)
    workers: dict[str, Worker] = {}
    errors: dict[str, str] = {}
    try:
        for engine in asked:
            python, adapter, options = engines.how(engine, args.home, args.model)
            if not Path(python).exists():
                errors[engine] = f"there is no {python}"
                continue
            worker = Worker(adapter, python, args.model, options)
            if "error" in worker.ready:
                errors[engine] = worker.ready["error"]
                worker.close()
            else:
                workers[engine] = worker
                print(f"{engine}: ready after {worker.ready['start_s']:.1f} s", flush=True)
        runs = alternate(args, workers, directory, errors)
    finally:
        for worker in workers.values():
            worker.close()
    write(args, runs, errors)
    return 1 if errors else 0


def alternate(args: argparse.Namespace, workers: dict[str, Worker], directory: Path, errors: dict[str, str]) -> Runs:
    """All repetitions of all workloads, engine after engine within each."""
    runs: Runs = defaultdict(lambda: defaultdict(list))
    for workload in args.workloads.split(","):
        for repetition in range(args.repeats):
            for engine, worker in workers.items():
                found = worker.run(workload, repetition)
                if "error" in found:
                    errors[f"{engine} {workload}"] = found["error"]
                    continue
                for metric, value in found.items():
                    runs[engine][f"{workload} {metric}"].append(value)
                print(f"{workload} {repetition} {engine}: {found}", flush=True)
            for name, value in limits(workload, directory).items():
                runs["limit"][f"{workload} {name}"].append(value)
    return runs


def limits(workload: str, directory: Path) -> dict[str, float]:
    """What the machine allows now, in bfloat16: W2's time between tokens, W3's rate. Empty without native kernels."""
    if workload not in ("w2", "w3") or importlib.util.find_spec("fairlead_cpu") is None:
        return {}
    import torch

    from comparing.models import num_params
    from fairlead_cpu import native

    kernels = native.kernels()
    if kernels is None:
        return {}
    body, head = num_params(directory)
    if workload == "w2":
        memory = torch.ones(1 << 28, dtype=torch.uint8)
        start = time.perf_counter()
        kernels.call.fl_probe_read(memory.data_ptr(), memory.nbytes)
        return {"itl_ms": 1e3 * 2 * (body + head) * (time.perf_counter() - start) / memory.nbytes}
    start = time.perf_counter()
    num_ops = kernels.call.fl_probe_multiply(1, 200_000)
    return {"prefill_tokens_per_s": num_ops / (time.perf_counter() - start) / (2 * body)}


def write(args: argparse.Namespace, runs: Runs, errors: dict[str, str]) -> None:
    """The JSON, the table and the plots."""
    args.out.mkdir(parents=True, exist_ok=True)
    data = {"model": args.model, "runs": runs, "errors": errors}
    (args.out / "compare.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    medians = {engine: {key: statistics.median(v) for key, v in found.items()} for engine, found in runs.items()}
    lines = [f"# {args.model}", ""]
    if args.model == "tiny":
        lines += ["**A dry run: its figures mean nothing.**", ""]
    lines += [f"Medians of {args.repeats} alternating repetitions.", ""]
    lines += ["| | " + " | ".join(medians) + " |", "|---" * (len(medians) + 1) + "|"]
    draw = runpy.run_path(str(HERE / "gpu" / "gpubench" / "plot.py"))["bar_chart"]
    for workload in args.workloads.split(","):
        for metric in workloads.METRICS[workload]:
            key = f"{workload} {metric}"
            found = {engine: figures[key] for engine, figures in medians.items() if key in figures}
            cells = [f"{found[engine]:.4g}" if engine in found else "" for engine in medians]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
            if found:
                draw(args.out / f"{workload}_{metric}.svg", key, [(name, value, None) for name, value in found.items()])
    lines += ["", *targets.table(args.model, medians)]
    lines += ["", *(f"* {name} failed: {error}" for name, error in errors.items())]
    text = "\n".join(lines).rstrip() + "\n"
    (args.out / "compare.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
