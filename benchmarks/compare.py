"""Fairlead beside other engines on the same requests, in turns: W1 to W4 of comparing/workloads.py.

    python benchmarks/compare.py --model smol135m
    python benchmarks/compare.py --python vllm=/opt/vllm/bin/python --llama-server ./llama-server --gguf smol135m.gguf
    python benchmarks/compare.py --model tiny --repeats 1 --out dry-run     # proves that it runs; measures nothing

Each engine runs in the Python that --python or FAIRLEAD_COMPARE_ENGINE names (this one for fairlead and transformers),
loads the model once, and is stopped (SIGSTOP) while another is measured. Repetitions alternate, medians count. Limits
are measured in the same turns, where fairlead-cpu has its kernels: weights over read bandwidth, and the rate of the
instruction that multiplies. Writes compare.json, compare.md and a plot for each workload.
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

from comparing import workloads

HERE = Path(__file__).parent
ENGINES = ("fairlead", "transformers", "vllm", "llamacpp", "openvino")
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
    parser.add_argument("--engines", help="of: " + ", ".join(ENGINES) + "; those that are installed if not given")
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--llama-server", help="path of llama.cpp's server")
    parser.add_argument("--gguf", help="the model for it")
    parser.add_argument("--openvino-dir", help="the model for OpenVINO, exported")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", help="of fairlead: int8 or int4; the others run what their files hold")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache" / "fairlead-bench")
    parser.add_argument("--out", type=Path, default=Path("compare-results"))
    args = parser.parse_args()
    from comparing.models import checkpoint

    directory = checkpoint(args.models, args.model).resolve()
    workers: dict[str, Worker] = {}
    errors: dict[str, str] = {}
    try:
        for engine, python in chosen(args).items():
            worker = Worker(engine, python, args.model, options_of(args, engine, directory))
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


def chosen(args: argparse.Namespace) -> dict[str, str]:
    """Engine to interpreter: what was asked for, or whatever an interpreter is known for."""
    named = dict(item.split("=", 1) for item in args.python)
    found: dict[str, str] = {}
    for engine in ENGINES:
        python = named.get(engine) or os.environ.get(f"FAIRLEAD_COMPARE_{engine.upper()}")
        module = "openvino_genai" if engine == "openvino" else engine
        has_own = engine == "llamacpp" and args.llama_server is not None
        if python is None and (has_own or importlib.util.find_spec(module) is not None):
            python = sys.executable
        if python is not None:
            found[engine] = python
    if args.engines is None:
        return found
    return {engine: found.get(engine, sys.executable) for engine in args.engines.split(",")}


def options_of(args: argparse.Namespace, engine: str, directory: Path) -> dict[str, Any]:
    """Those of `comparing.adapters.Options`."""
    found: dict[str, Any] = {"directory": str(directory), "dtype": args.dtype}
    if engine == "fairlead":
        found["quantization"] = args.quantization
    if engine == "llamacpp":
        found |= {"server": args.llama_server, "file": args.gguf}
    if engine == "openvino":
        found["file"] = args.openvino_dir
    return found


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
    data = {"model": args.model, "dtype": args.dtype, "quantization": args.quantization, "runs": runs, "errors": errors}
    (args.out / "compare.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    medians = {engine: {key: statistics.median(v) for key, v in found.items()} for engine, found in runs.items()}
    lines = [f"# {args.model}, {args.dtype}{', ' + args.quantization if args.quantization else ''}", ""]
    if args.model == "tiny":
        lines += ["**A dry run: its figures mean nothing.**", ""]
    lines += [f"Medians of {args.repeats} alternating repetitions.", ""]
    lines += ["| | " + " | ".join(medians) + " | fairlead to the best other |", "|---" * (len(medians) + 2) + "|"]
    draw = runpy.run_path(str(HERE / "gpu" / "gpubench" / "plot.py"))["bar_chart"]
    for workload in args.workloads.split(","):
        for metric in workloads.METRICS[workload]:
            key = f"{workload} {metric}"
            found = {engine: figures[key] for engine, figures in medians.items() if key in figures}
            cells = [f"{found[engine]:.4g}" if engine in found else "" for engine in medians]
            lines.append(f"| {key} | " + " | ".join(cells) + f" | {ratio(metric, found)} |")
            if found:
                draw(args.out / f"{workload}_{metric}.svg", key, [(name, value, None) for name, value in found.items()])
    lines += ["", *(f"* {name} failed: {error}" for name, error in errors.items())]
    text = "\n".join(lines).rstrip() + "\n"
    (args.out / "compare.md").write_text(text, encoding="utf-8")
    print(text)


def ratio(metric: str, found: dict[str, float]) -> str:
    """How many times better than the best rival; above 1 is better, whichever way the metric points."""
    rivals = [value for engine, value in found.items() if engine not in ("fairlead", "limit")]
    if not rivals or "fairlead" not in found:
        return ""
    if metric in workloads.LOWER_IS_BETTER:
        return f"{min(rivals) / found['fairlead']:.2f} x"
    return f"{found['fairlead'] / max(rivals):.2f} x"


if __name__ == "__main__":
    sys.exit(main())
