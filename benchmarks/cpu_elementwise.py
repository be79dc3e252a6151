"""Prints what the CPU's native norms, rotary positions, gates and embedding cost, as a share of a plain copy's speed.

    python benchmarks/cpu_elementwise.py --models smol135m --rows 1,64,512

An op's ceiling is torch's copy of as many bytes as it reads and writes, half and half, on the same threads and from the
same level of memory: activations are in a processor's cache, as in a model. Ops and copies alternate; the best and the
median of --rounds are shown (on a machine that does other work the best is the one to believe). At few rows the call
from Python is what is measured; a recorded step has none.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fairlead_cpu import native
from fairlead_cpu.native_ops import NativeOps


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a model: width, query and kv-heads, head size, width of the feed-forward layer, vocabulary."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate: int
    vocab: int


MODELS = {
    "smol135m": Sizes(width=576, num_heads=9, num_kv_heads=3, head_size=64, intermediate=1536, vocab=49_152),
    "qwen05b": Sizes(width=896, num_heads=14, num_kv_heads=2, head_size=64, intermediate=4864, vocab=151_936),
    "llama1b": Sizes(width=2048, num_heads=32, num_kv_heads=8, head_size=64, intermediate=8192, vocab=128_256),
}
Work = tuple[Callable[[], object], int]
"""A call, and the bytes that it reads and writes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="smol135m")
    parser.add_argument("--rows", default="1,64,512")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    kernels = native.kernels()
    if kernels is None:
        raise SystemExit("fairlead-cpu was built without kernels")
    torch.set_num_threads(len(kernels.layout.cpus))
    print(f"{kernels.isa}, {kernels.layout}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for model in args.models.split(","):
        for num_rows in map(int, args.rows.split(",")):
            for name, work in works(NativeOps(kernels), MODELS[model], num_rows).items():
                measure(f"{model} {name}", num_rows, work, args.rounds)


def works(ops: NativeOps, sizes: Sizes, num_rows: int) -> dict[str, Work]:
    """Every op of a decoder at these sizes, in bfloat16."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    x, residual, weight = randn(num_rows, sizes.width), randn(num_rows, sizes.width), randn(sizes.width)
    q, k = (randn(num_rows, heads, sizes.head_size) for heads in (sizes.num_heads, sizes.num_kv_heads))
    gate, table = randn(num_rows, 2 * sizes.intermediate), randn(sizes.vocab, sizes.width)
    positions, ids = torch.arange(num_rows), torch.randint(sizes.vocab, (num_rows,))
    angles = torch.randn(max(num_rows, 1), sizes.head_size)
    row = 2 * num_rows * sizes.width
    return {
        "rms_norm": (lambda: ops.rms_norm(x, weight, 1e-5), 2 * row),
        "fused_add_rms_norm": (lambda: ops.fused_add_rms_norm(x, residual, weight, 1e-5), 4 * row),
        "layer_norm": (lambda: ops.layer_norm(x, weight, weight, 1e-5), 2 * row),
        "rotary_embedding": (
            lambda: ops.rotary_embedding(q, k, positions, angles, angles, False),
            2 * (q.nbytes + k.nbytes),
        ),
        "silu_and_mul": (lambda: ops.silu_and_mul(gate), gate.nbytes * 3 // 2),
        "gelu_and_mul": (lambda: ops.gelu_and_mul(gate), gate.nbytes * 3 // 2),
        "embedding": (lambda: ops.embedding(ids, table), 2 * row),
    }


def measure(title: str, num_rows: int, work: Work, rounds: int) -> None:
    """Prints one line."""
    run, num_bytes = work
    source = torch.randint(-128, 127, (max(num_bytes // 2, 1),), dtype=torch.int8)
    target = torch.empty_like(source)
    seconds: list[float] = []
    copies: list[float] = []
    for _ in range(rounds):
        seconds.append(seconds_per_call(run))
        copies.append(seconds_per_call(lambda: target.copy_(source)))
    best, copy = min(seconds), min(copies)
    print(
        f"{title:30} {num_rows:4} rows  best {best * 1e6:8.1f} us  median {statistics.median(seconds) * 1e6:8.1f} us"
        f"  {num_bytes / best / 1e9:6.1f} of {num_bytes / copy / 1e9:6.1f} GB/s  {copy / best:5.0%} of a copy",
        flush=True,
    )


def seconds_per_call(run: Callable[[], object], budget_s: float = 2e-3) -> float:
    """Of calls that fill the budget."""
    calls, start = 0, time.perf_counter()
    while True:
        run()
        calls += 1
        elapsed = time.perf_counter() - start
        if elapsed > budget_s:
            return elapsed / calls


if __name__ == "__main__":
    with torch.inference_mode():
        main()
