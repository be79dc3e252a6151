"""Many steps on the native kernels: they leak nothing, and several engines share one pool beside torch's threads."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fairlead.interface import AttentionMetadata, AttentionShape, AttentionSpec
from fairlead_cpu import native, topology
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.linear import NativeLinear
from fairlead_cpu.native_attention import NativeAttention
from fairlead_cpu.native_sampling import NativeSampling

BLOCK, NUM_BLOCKS = 16, 40
pytestmark = [
    pytest.mark.skipif(not native.usable(), reason="fairlead-cpu was built without kernels"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory and threads are counted the way of Linux"),
]


@pytest.fixture(scope="module")
def kernels() -> Iterator[native.Kernels]:
    kernels = native.Kernels(native.usable()[0], topology.Layout(cpus=(-1, -1), bound=False, reason="test"))
    yield kernels
    kernels.call.fl_pool_shutdown()


class Model:
    """One layer with a head: what a step of an engine calls."""

    def __init__(self, kernels: native.Kernels, scheme: str) -> None:
        generator = torch.Generator().manual_seed(0)
        spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25)
        shape = AttentionShape(spec=spec, num_layers=1, block_size=BLOCK, dtype="bfloat16")
        self.attention = NativeAttention(shape, HostAllocator(), kernels)
        self.cache = self.attention.allocate(NUM_BLOCKS)[0]
        self.linear, self.sampling = NativeLinear(scheme, kernels, HostAllocator()), NativeSampling(kernels)
        self.enter, self.head = (
            self.linear.pack({"weight": torch.randn(*size, generator=generator).bfloat16()})
            for size in ((128, 64), (1000, 64))
        )

    def step(self, num_sequences: int, position: int) -> torch.Tensor:
        """A decode of so many sequences, each with `position` tokens before."""
        x = torch.linspace(-1, 1, num_sequences * 64).view(-1, 64).bfloat16()
        q, k, v = self.linear.apply(x, self.enter, None).view(-1, 8, 16).split((4, 2, 2), dim=1)
        tables = 1 + np.arange(num_sequences * 4, dtype=np.int32).reshape(-1, 4)
        metadata = AttentionMetadata(
            query_lens_S=np.ones(num_sequences, np.int32),
            seq_lens_S=np.full(num_sequences, position + 1, np.int32),
            block_tables_SB=tables,
            slot_mapping_T=(tables[:, position // BLOCK] * BLOCK + position % BLOCK).astype(np.int32),
        )
        out = self.attention.forward(q, k, v, self.cache, self.attention.plan(metadata))
        logits = self.linear.apply(out.flatten(1), self.head, None).float()
        settings = torch.tensor([[20.0], [0.9], [0.01], [0.5]], dtype=torch.float64).repeat(1, num_sequences)
        return self.sampling.draw_filtered(logits.softmax(-1), settings, 20)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_steps_leak_nothing(kernels: native.Kernels, count: Callable[..., int]) -> None:
    model, num_steps = Model(kernels, "int8"), count(1500, full=100_000)

    def run(steps: int) -> None:
        for i in range(steps):
            model.step(1 + i % 9, i % (4 * BLOCK))

    run(600)  # scratch grows to what is needed once
    before = resident_bytes()
    run(num_steps)
    assert resident_bytes() - before < (2 << 20), f"more than {(2 << 20) // num_steps} bytes a step"


def test_engines_at_once_share_the_pool_beside_torch(kernels: native.Kernels, count: Callable[..., int]) -> None:
    """They end, their tokens are those of each alone, and no thread is added."""
    models = [Model(kernels, scheme) for scheme in ("unquantized", "int8", "int4")]

    def tokens(model: Model) -> list[list[int]]:
        return [model.step(1 + i % 9, i % (4 * BLOCK)).tolist() for i in range(count(150, full=5000))]

    # each position is written before it is read, so a second run finds the same
    alone = [tokens(model) for model in models]
    alone = [tokens(model) for model in models]
    found: list[list[list[int]]] = [[] for _ in models]
    is_done = threading.Event()

    def torch_works() -> None:
        while not is_done.is_set():
            torch.mm(torch.ones(200, 200), torch.ones(200, 200))

    def engine(i: int) -> None:
        found[i] = tokens(models[i])

    beside = threading.Thread(target=torch_works)
    beside.start()
    num_threads = len(os.listdir("/proc/self/task"))
    engines = [threading.Thread(target=engine, args=(i,), daemon=True) for i in range(len(models))]
    for thread in engines:
        thread.start()
    for thread in engines:
        thread.join(200)
    most = len(os.listdir("/proc/self/task"))
    is_done.set()
    beside.join(60)
    assert not any(thread.is_alive() for thread in engines)
    assert found == alone
    assert most <= num_threads + torch.get_num_threads()
