"""Prints what attention over the paged cache costs on the CPU: the native kernels beside torch's fused attention.

    python benchmarks/cpu_attention.py [--model smol135m] [--repetitions 7]

Repetitions of the two alternate; the median is printed, with what it achieves of the bandwidth (bytes of keys and
values that the batch has, shared ones counted for each sequence) and of arithmetic. The read bandwidth, and the rate
of the instruction that multiplies, are measured in between, by the kernels' own probes and threads; the larger share
is of what limits. Layers have caches of their own, so that none is left in a processor's cache from the repetition
before.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from fairlead.interface import AttentionBackend, AttentionMetadata, AttentionShape, AttentionSpec
from fairlead.ops.attention import SlotCache
from fairlead_cpu import native
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.attention import SdpaAttention
from fairlead_cpu.native_attention import BlockCache, NativeAttention

MODELS = {"smol135m": (9, 3, 64), "qwen05b": (14, 2, 64), "llama1b": (32, 8, 64), "llama8b": (32, 8, 128)}
BLOCK_SIZE = 16
CACHE_BYTES = 2**29  # of all layers together


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`num_seqs` sequences of `context` tokens, of which the last `num_new` are computed and the first `shared` are
    in blocks that all sequences share."""

    name: str
    num_seqs: int
    num_new: int
    context: int
    shared: int = 0


WORKLOADS = (
    Workload(name="decode, 8 sequences at 8192", num_seqs=8, num_new=1, context=8192),
    Workload(name="decode, 1 sequence at 8192", num_seqs=1, num_new=1, context=8192),
    Workload(name="decode, 64 sequences at 256", num_seqs=64, num_new=1, context=256),
    Workload(name="prefill of 2048", num_seqs=1, num_new=2048, context=2048),
    Workload(name="decode, 32 sequences share 1024", num_seqs=32, num_new=1, context=1072, shared=1024),
    Workload(name="prefill, 32 sequences share 1024", num_seqs=32, num_new=32, context=1056, shared=1024),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="smol135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    kernels = native.kernels()
    if kernels is None:
        raise SystemExit("fairlead-cpu was built without kernels")
    torch.set_num_threads(len(kernels.layout.cpus))
    print(f"{args.model}, {args.dtype}, {kernels.isa}, {kernels.layout}")
    for workload in WORKLOADS:
        measure(workload, args.model, args.dtype, args.repetitions, kernels)


@torch.inference_mode()
def measure(workload: Workload, model: str, dtype: str, repetitions: int, kernels: native.Kernels) -> None:
    """Runs both backends over the workload, in turn, and prints a line for each."""
    num_heads, num_kv_heads, head_size = MODELS[model]
    spec = AttentionSpec(num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, scale=head_size**-0.5)
    metadata, num_blocks = make_step(workload)
    one = AttentionShape(spec=spec, num_layers=1, block_size=BLOCK_SIZE, dtype=dtype)
    block_bytes = SdpaAttention(one, HostAllocator()).block_bytes()
    num_layers = min(max(CACHE_BYTES // (num_blocks * block_bytes), 2), 64)
    shape = AttentionShape(spec=spec, num_layers=num_layers, block_size=BLOCK_SIZE, dtype=dtype)
    backends: list[AttentionBackend] = [
        NativeAttention(shape, HostAllocator(), kernels),
        SdpaAttention(shape, HostAllocator()),
    ]
    num_tokens = workload.num_seqs * workload.num_new
    q, k, v = (
        torch.randn(num_tokens, n, head_size).to(getattr(torch, dtype)) for n in (num_heads, num_kv_heads, num_kv_heads)
    )
    caches = [backend.allocate(num_blocks) for backend in backends]
    for layers in caches:
        for cache in layers:
            assert isinstance(cache, BlockCache | SlotCache)
            for tensor in (cache.blocks,) if isinstance(cache, BlockCache) else (cache.k, cache.v):
                tensor.zero_()
    seconds: list[list[float]] = [[], []]
    bandwidths, rates = [], []
    instruction = ("float32", "bfloat16").index(dtype)  # of csrc/probe.cpp
    probe = torch.ones(2**28, dtype=torch.uint8)
    for repetition in range(repetitions + 1):
        for backend, layers, found in zip(backends, caches, seconds, strict=True):
            start = time.perf_counter()
            plan = backend.plan(metadata)
            for cache in layers:
                backend.forward(q, k, v, cache, plan)
            if repetition:
                found.append((time.perf_counter() - start) / num_layers)
        start = time.perf_counter()
        kernels.call.fl_probe_read(probe.data_ptr(), probe.nbytes)
        bandwidths.append(probe.nbytes / (time.perf_counter() - start))
        start = time.perf_counter()
        num_ops = kernels.call.fl_probe_multiply(instruction, 20_000)
        rates.append(num_ops / (time.perf_counter() - start))
    read, rate = statistics.median(bandwidths), statistics.median(rates)
    num_bytes = workload.num_seqs * workload.context * block_bytes / BLOCK_SIZE
    pairs = workload.num_seqs * workload.num_new * (workload.context - (workload.num_new - 1) / 2)
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    ops = 4 * pairs * num_heads * head_size
    print(
        f"{workload.name} ({num_layers} layers): native {ratio:.2f} x as fast; "
        f"read bandwidth {read / 1e9:.1f} GB/s, arithmetic {rate / 1e9:.0f} GFLOP/s"
    )
    for backend, found in zip(backends, seconds, strict=True):
        median = statistics.median(found)
        print(
            f"  {backend.name:8} {median * 1e6:9.0f} us a layer  {num_bytes / median / 1e9:7.1f} GB/s "
            f"({num_bytes / median / read:4.0%} of it)  {ops / median / 1e9:7.1f} GFLOP/s "
            f"({ops / median / rate:4.0%} of it)"
        )


def make_step(workload: Workload) -> tuple[AttentionMetadata, int]:
    """The step's integers, blocks scattered over the cache, and the number of blocks."""
    per_sequence, num_shared = -(-workload.context // BLOCK_SIZE), workload.shared // BLOCK_SIZE
    num_own = per_sequence - num_shared
    num_blocks = 1 + num_shared + workload.num_seqs * num_own
    free = 1 + np.random.default_rng(0).permutation(num_blocks - 1)
    shared = np.broadcast_to(free[:num_shared], (workload.num_seqs, num_shared))
    tables = np.hstack([shared, free[num_shared:].reshape(workload.num_seqs, num_own)]).astype(np.int32)
    positions = np.arange(workload.context - workload.num_new, workload.context)
    slots = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    metadata = AttentionMetadata(
        query_lens_S=np.full(workload.num_seqs, workload.num_new, np.int32),
        seq_lens_S=np.full(workload.num_seqs, workload.context, np.int32),
        block_tables_SB=tables,
        slot_mapping_T=slots.ravel().astype(np.int32),
    )
    return metadata, num_blocks


if __name__ == "__main__":
    main()
