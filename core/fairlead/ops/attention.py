"""Paged attention from the reference ops: what a platform without kernels of its own uses, and the oracle."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, HostCache, KVCache, MemoryAllocator
from fairlead.ops import reference


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCache:
    """One layer's keys and values by slot, each (blocks * block size, K, D). `v` is `k` where keys hold the values."""

    k: torch.Tensor
    v: torch.Tensor


class SlotCacheOwner:
    """The part that backends with the plain slot layout share: sizes, allocation, copies of blocks, host and all.

    The cache is of the model's dtype; one of another is refused with a ConfigError.
    """

    name: str

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator) -> None:
        if shape.kv_dtype not in ("auto", shape.dtype):
            raise ConfigError(
                f"the {self.name!r} attention backend keeps {shape.dtype} in its cache, not {shape.kv_dtype}; "
                "leave kv_cache_dtype at 'auto', or take another backend"
            )
        self.shape, self.spec = shape, shape.spec
        self._allocator = allocator
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        self._num_tensors = 1 if shape.spec.value_size is not None else 2

    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        per_token = self._num_tensors * self.spec.num_kv_heads * self.spec.head_size * self._dtype.itemsize
        return self.shape.num_layers * self.shape.block_size * per_token

    def allocate(self, num_blocks: int) -> list[KVCache]:
        """One SlotCache per layer."""
        size = self._size(num_blocks)
        return self._caches(lambda: self._allocator.empty(size, self._dtype, tag="kv_cache"))

    def allocate_host(self, num_blocks: int) -> list[HostCache]:
        """One SlotCache per layer, in pageable host memory."""
        size = self._size(num_blocks)
        return self._caches(lambda: torch.empty(size, dtype=self._dtype, device="cpu"))

    def copy_blocks(self, kv_caches: Seq[KVCache], pairs: Seq[tuple[int, int]]) -> None:
        """Copies whole blocks within every layer, one pair after the other."""
        self._copy(kv_caches, kv_caches, pairs)

    def copy_to_host(self, kv_caches: Seq[KVCache], host_caches: Seq[HostCache], pairs: Seq[tuple[int, int]]) -> None:
        """Copies whole blocks from the device, one pair after the other."""
        self._copy(kv_caches, host_caches, pairs)

    def copy_from_host(self, host_caches: Seq[HostCache], kv_caches: Seq[KVCache], pairs: Seq[tuple[int, int]]) -> None:
        """Copies whole blocks to the device, one pair after the other."""
        self._copy(host_caches, kv_caches, pairs)

    def _size(self, num_blocks: int) -> tuple[int, int, int]:
        return (num_blocks * self.shape.block_size, self.spec.num_kv_heads, self.spec.head_size)

    def _caches(self, empty: Callable[[], torch.Tensor]) -> list[KVCache]:
        caches: list[KVCache] = []
        for _ in range(self.shape.num_layers):
            tensors = [empty() for _ in range(self._num_tensors)]
            caches.append(SlotCache(k=tensors[0], v=tensors[-1]))
        return caches

    def _copy(self, sources: Seq[KVCache], destinations: Seq[KVCache], pairs: Seq[tuple[int, int]]) -> None:
        size = self.shape.block_size
        for source, destination in zip(sources, destinations, strict=True):
            assert isinstance(source, SlotCache)
            assert isinstance(destination, SlotCache)
            for read, write in ((source.k, destination.k), (source.v, destination.v))[: self._num_tensors]:
                for i, j in pairs:
                    write[j * size : (j + 1) * size] = read[i * size : (i + 1) * size]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    query_lens_S: list[int]
    seq_lens_S: list[int]
    block_tables_SB: torch.Tensor
    slot_mapping_T: torch.Tensor


class ReferenceAttention(SlotCacheOwner):
    """AttentionBackend on `reference.kv_cache_write` and `reference.paged_attention`: correct, and slow."""

    name = "reference"

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator, device: torch.device) -> None:
        super().__init__(shape, allocator)
        self._device = device

    def plan(self, metadata: AttentionMetadata) -> object:
        """Moves the step's integers to the device."""
        return _Plan(
            query_lens_S=metadata.query_lens_S.tolist(),
            seq_lens_S=metadata.seq_lens_S.tolist(),
            block_tables_SB=torch.from_numpy(metadata.block_tables_SB).to(self._device),
            slot_mapping_T=torch.from_numpy(metadata.slot_mapping_T).to(self._device).long(),
        )

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_cache: KVCache, plan: object
    ) -> torch.Tensor:
        """Writes, then attends, one sequence after the other."""
        assert isinstance(plan, _Plan)
        assert isinstance(kv_cache, SlotCache)
        reference.kv_cache_write(k_TKD, kv_cache.k, plan.slot_mapping_T)
        if v_TKD is not None:
            reference.kv_cache_write(v_TKD, kv_cache.v, plan.slot_mapping_T)
        return reference.paged_attention(
            q_THD,
            kv_cache.k,
            kv_cache.v,
            plan.query_lens_S,
            plan.seq_lens_S,
            plan.block_tables_SB,
            self.shape.block_size,
            self.spec,
        )
