"""The paged cache of the Triton attention: whole blocks, copied on the device, to pinned host memory and back.

Shapes: B blocks, P planes (keys and values, or the keys that hold both), K kv-heads, L tokens of a block, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fairlead.interface import AttentionShape, HostCache, KVCache, MemoryAllocator


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCache:
    """One layer: `data` (B, P, K, L, D), and with a scale per token and head `scales` (B, P, K, L) in float32."""

    data: torch.Tensor
    scales: torch.Tensor | None

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a block consists of, block by block in the first dimension."""
        return (self.data,) if self.scales is None else (self.data, self.scales)


class PagedCacheOwner:
    """Sizes, allocation and copies of an AttentionBackend's cache."""

    def __init__(
        self,
        shape: AttentionShape,
        allocator: MemoryAllocator,
        dtype: torch.dtype,
        *,
        has_scales: bool,
        pin_memory: bool,
    ) -> None:
        self.shape = shape
        self._allocator, self._dtype, self._has_scales, self._pin_memory = allocator, dtype, has_scales, pin_memory
        planes = 1 if shape.spec.value_size is not None else 2
        self._block_shape = (planes, shape.spec.num_kv_heads, shape.block_size, shape.spec.head_size)

    def block_bytes(self) -> int:
        """Bytes of one block over all layers, scales included."""
        planes, heads, tokens, head_size = self._block_shape
        per_row = head_size * self._dtype.itemsize + (4 if self._has_scales else 0)
        return self.shape.num_layers * planes * heads * tokens * per_row

    def allocate(self, num_blocks: int) -> list[KVCache]:
        """One PagedCache per layer, uninitialised."""

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return self._allocator.empty(shape, dtype, tag="kv_cache")

        size = (num_blocks, *self._block_shape)
        return [
            PagedCache(
                data=empty(size, self._dtype), scales=empty(size[:-1], torch.float32) if self._has_scales else None
            )
            for _ in range(self.shape.num_layers)
        ]

    def allocate_host(self, num_blocks: int) -> list[HostCache]:
        """One PagedCache per layer, in host memory that the device can copy from by itself, where it has such."""

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self._pin_memory)

        size = (num_blocks, *self._block_shape)
        return [
            PagedCache(
                data=empty(size, self._dtype), scales=empty(size[:-1], torch.float32) if self._has_scales else None
            )
            for _ in range(self.shape.num_layers)
        ]

    def copy_blocks(self, kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks within every layer, one pair after the other."""
        _copy(kv_caches, kv_caches, [(i, j, 1) for i, j in pairs])

    def copy_to_host(
        self, kv_caches: Sequence[KVCache], host_caches: Sequence[HostCache], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copies whole blocks from the device, without waiting for it; neighbours in one piece."""
        _copy(kv_caches, host_caches, runs(pairs))

    def copy_from_host(
        self, host_caches: Sequence[HostCache], kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copies whole blocks to the device, without waiting for it; neighbours in one piece."""
        _copy(host_caches, kv_caches, runs(pairs))


def runs(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Pairs as (source, destination, number of blocks), those whose both sides follow each other put together."""
    found: list[tuple[int, int, int]] = []
    for source, destination in pairs:
        if found and (source, destination) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
            found[-1] = (found[-1][0], found[-1][1], found[-1][2] + 1)
        else:
            found.append((source, destination, 1))
    return found


def _copy(sources: Sequence[KVCache], destinations: Sequence[KVCache], pieces: Sequence[tuple[int, int, int]]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        assert isinstance(source, PagedCache)
        assert isinstance(destination, PagedCache)
        for read, write in zip(source.tensors(), destination.tensors(), strict=True):
            for i, j, n in pieces:
                write[j : j + n].copy_(read[i : i + n], non_blocking=True)
