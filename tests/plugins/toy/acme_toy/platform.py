"""The toy as a Platform: shapes that are known when it starts, and nothing else, can run."""

from collections.abc import Callable

import torch

from acme_toy.attention import ToyAttention
from acme_toy.device import held_by, register
from fairlead.interface import (
    AttentionBackend,
    AttentionShape,
    Capabilities,
    Defaults,
    Device,
    GraphRunner,
    MemoryAllocator,
    MemoryInfo,
)
from fairlead.ops.graph import smallest_bucket
from fairlead.ops.memory import PooledAllocator
from fairlead.ops.platform import BasicPlatform

BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)


class ToyPlatform(BasicPlatform):
    """A device with an odd block size and a layout of its own."""

    name = "toy"
    capabilities = Capabilities(
        dtypes=("float32",),
        block_sizes=(12,),
        kv_layouts=("toy",),
        graphs=True,
        static_shapes=True,
        max_batched_tokens=BUCKETS[-1],
        max_num_seqs=BUCKETS[-1],
    )
    defaults = Defaults(
        dtype="float32", block_size=12, max_num_batched_tokens=BUCKETS[-1], device_memory_utilization=0.5
    )

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.torch_device = register()
        self.allocator: MemoryAllocator = PooledAllocator(
            self.allocate, storage_of=lambda tensor: held_by(tensor).untyped_storage()
        )

    def max_swap_bytes(self, device_bytes: int) -> int | None:
        """The toy's memory is the host's in disguise: as much again."""
        return self.memory_info().free_bytes

    def memory_info(self) -> MemoryInfo:
        """What its own pools have left."""
        used = self.allocator.allocated_bytes("weights") + self.allocator.allocated_bytes("kv_cache")
        total = self.device.memory_bytes
        return MemoryInfo(total_bytes=total, free_bytes=max(total - used, 0))

    def attention_backends(self) -> tuple[str, ...]:
        """Its own, then the reference."""
        return (ToyAttention.name, *super().attention_backends())

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        """Makes the backend."""
        if name == ToyAttention.name:
            return ToyAttention(shape, self.allocator, self.torch_device)
        return super().attention(name, shape)

    def graph_runner(self) -> GraphRunner:
        """One for each engine."""
        return ToyGraphRunner()


class ToyGraphRunner:
    """Runs steps of the sizes that it has seen while the engine started, from inputs at fixed places."""

    buckets: tuple[int, ...] = BUCKETS

    def __init__(self) -> None:
        self._inputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        """The next power of two."""
        return smallest_bucket(BUCKETS, num_tokens)

    def run(
        self, forward: Callable[..., torch.Tensor], token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: object
    ) -> torch.Tensor:
        """Captures on the first call of a size; once all are known, anything else cannot run."""
        size = len(token_ids_T)
        if size not in self._inputs:
            if size not in BUCKETS:
                raise RuntimeError(f"the toy has no shape for {size} rows")
            self._inputs[size] = torch.empty_like(token_ids_T), torch.empty_like(positions_T)
        fixed_ids_T, fixed_positions_T = self._inputs[size]
        fixed_ids_T.copy_(token_ids_T)
        fixed_positions_T.copy_(positions_T)
        return forward(fixed_ids_T, fixed_positions_T, step)
