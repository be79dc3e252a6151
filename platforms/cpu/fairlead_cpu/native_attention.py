"""Paged attention on the native kernels: csrc/attention.h says how, and how the cache lies in memory.

Shapes: T packed tokens, H query heads, K kv-heads, D head size, E head size of the values.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, HostCache, KVCache, MemoryAllocator
from fairlead_cpu.native import Kernels

_DTYPES = ("float32", "bfloat16")
KV_DTYPES = ("auto", "float8_e4m3fn", "float8_e5m2")
"""Of the cache, in the order of `attention::Shape::stored`."""


class _Shape(ctypes.Structure):
    """`attention::Shape`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("num_heads", "num_kv_heads", "head_size", "value_size", "block_size")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "is_latent", "sliding_window")),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("alibi_slopes", ctypes.POINTER(ctypes.c_float)),
        ("stored", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCache:
    """One layer's cache, (blocks, bytes of a block)."""

    blocks: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The step as the kernels read it. It points into the arrays of `metadata`; all layers share `scratch`."""

    metadata: AttentionMetadata
    words: np.ndarray
    scratch: np.ndarray
    address: int
    scratch_address: int

    @property
    def pointers(self) -> tuple[int, int]:
        """What a recorded step reads of it."""
        return self.address, self.scratch_address


class NativeAttention:
    """AttentionBackend on the native kernels. A token's result has the same bits in any batch and any chunk."""

    name = "native"

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator, kernels: Kernels) -> None:
        if shape.dtype not in _DTYPES:
            raise ConfigError(f"the native attention has no {shape.dtype}; it has {', '.join(_DTYPES)}")
        kv_dtype = "auto" if shape.kv_dtype == shape.dtype else shape.kv_dtype
        if kv_dtype not in KV_DTYPES:
            raise ConfigError(f"the native attention keeps no cache of {kv_dtype}; it has {', '.join(KV_DTYPES)}")
        spec = shape.spec
        self.shape = shape
        self._allocator = allocator
        self._dtype: torch.dtype = getattr(torch, shape.dtype)
        self._value_size = spec.value_size or spec.head_size
        slopes = spec.alibi_slopes
        self._shape = _Shape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            value_size=self._value_size,
            block_size=shape.block_size,
            is_bf16=shape.dtype == "bfloat16",
            is_latent=spec.value_size is not None,
            sliding_window=spec.sliding_window or 0,
            scale=spec.scale,
            soft_cap=spec.soft_cap or 0.0,
            alibi_slopes=None if slopes is None else (ctypes.c_float * len(slopes))(*slopes),
            stored=KV_DTYPES.index(kv_dtype),
        )
        self._shape_address = ctypes.addressof(self._shape)
        self._call = kernels.call
        self._attend = kernels.call.fl_attention
        self._plan_bytes = 4096
        self._layer_block_bytes: int = self._call.fl_attention_block_bytes(self._shape_address)

    def block_bytes(self) -> int:
        """Bytes of one block over all layers, with what the layout pads."""
        return self.shape.num_layers * self._layer_block_bytes

    def allocate(self, num_blocks: int) -> list[KVCache]:
        """One BlockCache per layer."""
        size = (num_blocks, self._layer_block_bytes)
        caches: list[KVCache] = []
        for _ in range(self.shape.num_layers):
            blocks = self._allocator.empty(size, torch.uint8, tag="kv_cache")
            self._call.fl_advise_huge_pages(blocks.data_ptr(), blocks.nbytes)
            caches.append(BlockCache(blocks=blocks))
        return caches

    def plan(self, metadata: AttentionMetadata) -> object:
        """Lays out the step's work; also what its merges need in memory."""
        arrays = (
            metadata.query_lens_S,
            metadata.seq_lens_S,
            metadata.block_tables_SB,
            metadata.slot_mapping_T,
        )
        query_lens, seq_lens, tables, slots = (np.ascontiguousarray(a, dtype=np.int32) for a in arrays)
        kept = AttentionMetadata(
            query_lens_S=query_lens, seq_lens_S=seq_lens, block_tables_SB=tables, slot_mapping_T=slots
        )
        while True:
            words = np.empty(self._plan_bytes // 8, np.int64)
            needed: int = self._call.fl_attention_plan(
                self._shape_address,
                len(query_lens),
                query_lens.ctypes.data,
                seq_lens.ctypes.data,
                tables.ctypes.data,
                tables.shape[1],
                slots.ctypes.data,
                len(slots),
                words.ctypes.data,
                words.nbytes,
            )
            if needed <= words.nbytes:
                break
            self._plan_bytes = 2 * needed // 8 * 8
        address = words.ctypes.data
        num_scratch_bytes: int = self._call.fl_attention_scratch_bytes(self._shape_address, address)
        scratch = np.empty(num_scratch_bytes, np.uint8)
        return _Plan(metadata=kept, words=words, scratch=scratch, address=address, scratch_address=scratch.ctypes.data)

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_cache: KVCache, plan: object
    ) -> torch.Tensor:
        """One native call, over the pool's threads."""
        assert isinstance(plan, _Plan)
        assert isinstance(kv_cache, BlockCache)
        out_THE = torch.empty((q_THD.shape[0], q_THD.shape[1], self._value_size), dtype=self._dtype)
        if v_TKD is None:
            v_TKD = k_TKD
        q_THD, k_TKD, v_TKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TKD, v_TKD))
        self._attend(
            self._shape_address,
            plan.address,
            q_THD.data_ptr(),
            q_THD.stride(0),
            q_THD.stride(1),
            k_TKD.data_ptr(),
            k_TKD.stride(0),
            k_TKD.stride(1),
            v_TKD.data_ptr(),
            v_TKD.stride(0),
            v_TKD.stride(1),
            kv_cache.blocks.data_ptr(),
            out_THE.data_ptr(),
            plan.scratch_address,
        )
        return out_THE

    def allocate_host(self, num_blocks: int) -> list[HostCache]:
        """One BlockCache per layer, in memory of its own."""
        size = (num_blocks, self._layer_block_bytes)
        return [BlockCache(blocks=torch.empty(size, dtype=torch.uint8)) for _ in range(self.shape.num_layers)]

    def copy_blocks(self, kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks within every layer, one pair after the other."""
        _copy(kv_caches, kv_caches, pairs)

    def copy_to_host(
        self, kv_caches: Sequence[KVCache], host_caches: Sequence[HostCache], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copies whole blocks, one pair after the other."""
        _copy(kv_caches, host_caches, pairs)

    def copy_from_host(
        self, host_caches: Sequence[HostCache], kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copies whole blocks, one pair after the other."""
        _copy(host_caches, kv_caches, pairs)


def _copy(sources: Sequence[KVCache], destinations: Sequence[KVCache], pairs: Sequence[tuple[int, int]]) -> None:
    for read, write in zip(sources, destinations, strict=True):
        assert isinstance(read, BlockCache)
        assert isinstance(write, BlockCache)
        for i, j in pairs:
            write.blocks[j] = read.blocks[i]
