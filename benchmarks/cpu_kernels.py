"""Prints how close the CPU's native matmuls come to the machine's limits, and how torch does on the same shapes.

    python benchmarks/cpu_kernels.py --models smol135m --rows 1,8,64,512 --schemes unquantized,int8,int4

Limits are measured in the same run, between the kernels: the rate of the instruction that multiplies, on all threads,
and the bandwidth of reading. A matmul's limit is the longer of its arithmetic at that rate and its packed weights at
that bandwidth. Candidates alternate; each has --rounds short measurements, of which the best and the median are shown
(on a machine that does other work the best is the one to believe). Weights rotate, so that they come from memory as
in a model. Torch multiplies bfloat16 by oneDNN's packed weights.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fairlead.interface import UNQUANTIZED, LinearShape
from fairlead_cpu import native
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.linear import NativeLinear

# (inputs, outputs) by layer
MODELS = {
    "smol135m": {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152)},
    "qwen05b": {
        "qkv": (896, 1152),
        "o": (896, 896),
        "gate_up": (896, 9728),
        "down": (4864, 896),
        "head": (896, 151936),
    },
    "llama1b": {
        "qkv": (2048, 3072),
        "o": (2048, 2048),
        "gate_up": (2048, 16384),
        "down": (8192, 2048),
        "head": (2048, 128256),
    },
}
INSTRUCTION = {UNQUANTIZED: 1, "int8": 2, "int4": 1}  # of csrc/probe.cpp: bfloat16, int8
MEMORY_BYTES = 128 << 20  # weights of one candidate, at least
PIECE_BYTES = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smol135m")
    parser.add_argument("--layers", default="qkv,o,gate_up,down,head")
    parser.add_argument("--rows", default="1,8,64,512")
    parser.add_argument("--schemes", default="unquantized,int8,int4")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    kernels = native.kernels()
    if kernels is None:
        raise SystemExit("fairlead-cpu was built without kernels")
    torch.set_num_threads(len(kernels.layout.cpus))
    print(f"{kernels.isa}, {kernels.layout}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for model in args.models.split(","):
        for layer in args.layers.split(","):
            shape = LinearShape(
                in_features=MODELS[model][layer][0], out_features=MODELS[model][layer][1], dtype="bfloat16"
            )
            bench = Bench(kernels, shape, args.schemes.split(","))
            for num_rows in map(int, args.rows.split(",")):
                bench.measure(f"{model} {layer}", num_rows, args.rounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to multiply: `run(x, i)` takes its i-th copy of the weight, of `weight_bytes`."""

    run: Callable[[torch.Tensor, int], object]
    num_copies: int
    weight_bytes: int
    instruction: int


class Bench:
    """All candidates for one shape."""

    def __init__(self, kernels: native.Kernels, shape: LinearShape, schemes: list[str]) -> None:
        self._kernels, self._shape, self._random = kernels, shape, random.Random(0)
        self._memory = torch.zeros(MEMORY_BYTES // 4)
        weight = torch.empty(shape.out_features, shape.in_features).normal_().bfloat16()
        self._candidates = {scheme: self._native(scheme, weight) for scheme in schemes}
        self._candidates["torch"] = self._torch(weight)

    def measure(self, title: str, num_rows: int, rounds: int) -> None:
        """Prints one line for each candidate."""
        x = torch.empty(num_rows, self._shape.in_features).normal_().bfloat16()
        num_ops = 2 * num_rows * self._shape.in_features * self._shape.out_features
        seconds: dict[str, list[float]] = defaultdict(list)
        rates: dict[int, list[float]] = defaultdict(list)
        bandwidths: list[float] = []
        order = list(self._candidates.items())
        for _ in range(rounds):
            self._random.shuffle(order)  # whoever always comes last in a time slice would look slow
            for name, candidate in order:
                seconds[name].append(self._seconds_per_call(candidate, x))
            for instruction in {c.instruction for c in self._candidates.values()}:
                rates[instruction].append(self._rate(instruction))
            bandwidths.append(self._bandwidth())
        bandwidth = max(bandwidths)
        for name, candidate in self._candidates.items():
            rate = max(rates[candidate.instruction])
            limit = max(num_ops / rate, candidate.weight_bytes / bandwidth)
            best = min(seconds[name])
            print(
                f"{title:18} {num_rows:4} rows  {name:12} best {best * 1e6:9.1f} us"
                f"  median {statistics.median(seconds[name]) * 1e6:9.1f} us"
                f"  {num_ops / best / 1e9:7.0f} of {rate / 1e9:5.0f} GOP/s"
                f"  {candidate.weight_bytes / best / 1e9:5.1f} of {bandwidth / 1e9:4.1f} GB/s"
                f"  {100 * limit / best:4.0f} % of the limit  {min(seconds['torch']) / best:5.2f} x torch",
                flush=True,
            )

    def _seconds_per_call(self, candidate: Candidate, x: torch.Tensor, budget_s: float = 2e-3) -> float:
        calls, start = 0, time.perf_counter()
        while True:
            candidate.run(x, calls % candidate.num_copies)
            calls += 1
            elapsed = time.perf_counter() - start
            if elapsed > budget_s:
                return elapsed / calls

    def _rate(self, instruction: int) -> float:
        start = time.perf_counter()
        num_ops: int = self._kernels.call.fl_probe_multiply(instruction, 20_000)
        return num_ops / (time.perf_counter() - start)

    def _bandwidth(self) -> float:
        """The best of pieces as long as a measurement of a kernel."""
        best = 0.0
        for offset in range(0, self._memory.nbytes, PIECE_BYTES):
            start = time.perf_counter()
            self._kernels.call.fl_probe_read(self._memory.data_ptr() + offset, PIECE_BYTES)
            best = max(best, PIECE_BYTES / (time.perf_counter() - start))
        return best

    def _native(self, scheme: str, weight: torch.Tensor) -> Candidate:
        method = NativeLinear(scheme, self._kernels, HostAllocator())
        weight_bytes = method.packed_bytes(self._shape)
        copies = [method.pack({"weight": weight}) for _ in range(-(-MEMORY_BYTES // weight_bytes))]
        return Candidate(
            run=lambda x, i: method.apply(x, copies[i], None),
            num_copies=len(copies),
            weight_bytes=weight_bytes,
            instruction=INSTRUCTION[scheme],
        )

    def _torch(self, weight: torch.Tensor) -> Candidate:
        reorder, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        copies = [reorder(weight.clone(), 16) for _ in range(-(-MEMORY_BYTES // weight.nbytes))]
        return Candidate(
            run=lambda x, i: multiply(x, copies[i], None, "none", [], ""),
            num_copies=len(copies),
            weight_bytes=weight.nbytes,
            instruction=INSTRUCTION[UNQUANTIZED],
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
