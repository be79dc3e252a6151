"""The toy's attention, on a cache of its own layout. Shapes: see `fairlead.interface.attention`; L context tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, HostCache, KVCache, MemoryAllocator


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyCache:
    """One layer: keys (K, blocks, D, block size), values (K, blocks, block size, D): heads apart, keys transposed."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    rows: slice
    first: int
    num_tokens: int
    blocks_B: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    blocks_T: torch.Tensor
    offsets_T: torch.Tensor
    sequences: tuple[_Sequence, ...]


class ToyAttention:
    """AttentionBackend that gathers each sequence's blocks."""

    name = "toy"

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator, device: torch.device) -> None:
        spec = shape.spec
        if any((spec.sliding_window, spec.soft_cap, spec.alibi_slopes, spec.value_size)):
            raise ConfigError("the toy knows plain causal attention only")
        self._shape, self._spec, self._allocator, self._device = shape, spec, allocator, device

    def block_bytes(self) -> int:
        """Keys and values of a block, over all layers."""
        return 2 * 4 * self._shape.num_layers * self._shape.block_size * self._spec.num_kv_heads * self._spec.head_size

    def allocate(self, num_blocks: int) -> list[KVCache]:
        """One ToyCache per layer."""
        K, D, size = self._spec.num_kv_heads, self._spec.head_size, self._shape.block_size
        shapes = (K, num_blocks, D, size), (K, num_blocks, size, D)
        pairs = [
            [self._allocator.empty(shape, torch.float32, tag="kv_cache") for shape in shapes]
            for _ in range(self._shape.num_layers)
        ]
        return [ToyCache(k=k, v=v) for k, v in pairs]

    def plan(self, metadata: AttentionMetadata) -> object:
        """Where each token goes, and which blocks each sequence reads."""
        size, start = self._shape.block_size, 0
        slots_T = torch.from_numpy(metadata.slot_mapping_T).long()
        sequences = []
        lens = zip(metadata.query_lens_S.tolist(), metadata.seq_lens_S.tolist(), strict=True)
        for (num_queries, num_tokens), row in zip(lens, metadata.block_tables_SB, strict=True):
            blocks_B = torch.from_numpy(row[: -(-num_tokens // size)]).long().to(self._device)
            rows = slice(start, start + num_queries)
            sequences.append(
                _Sequence(rows=rows, first=num_tokens - num_queries, num_tokens=num_tokens, blocks_B=blocks_B)
            )
            start += num_queries
        return _Plan(
            blocks_T=(slots_T // size).to(self._device),
            offsets_T=(slots_T % size).to(self._device),
            sequences=tuple(sequences),
        )

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_cache: KVCache, plan: object
    ) -> torch.Tensor:
        """Writes, then attends, one sequence after the other."""
        assert isinstance(plan, _Plan)
        assert isinstance(kv_cache, ToyCache)
        assert v_TKD is not None
        kv_cache.k.transpose(2, 3)[:, plan.blocks_T, plan.offsets_T] = k_TKD.transpose(0, 1)
        kv_cache.v[:, plan.blocks_T, plan.offsets_T] = v_TKD.transpose(0, 1)
        group = self._spec.num_heads // self._spec.num_kv_heads
        outs = []
        for sequence in plan.sequences:
            k_KLD, v_KLD = (
                x[:, sequence.blocks_B].flatten(1, 2)[:, : sequence.num_tokens].repeat_interleave(group, dim=0)
                for x in (kv_cache.k.transpose(2, 3), kv_cache.v)
            )
            scores_HQL = q_THD[sequence.rows].transpose(0, 1) @ k_KLD.transpose(1, 2) * self._spec.scale
            keys_L = torch.arange(sequence.num_tokens, device=q_THD.device)
            scores_HQL.masked_fill_(keys_L > keys_L[sequence.first :, None], -torch.inf)
            outs.append((scores_HQL.softmax(-1) @ v_KLD).transpose(0, 1))
        return torch.cat(outs)

    def copy_blocks(self, kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks within every layer, one pair after the other."""
        _copy(kv_caches, kv_caches, pairs)

    def allocate_host(self, num_blocks: int) -> list[HostCache]:
        """One ToyCache per layer, of host tensors."""
        K, D, size = self._spec.num_kv_heads, self._spec.head_size, self._shape.block_size
        return [
            ToyCache(k=torch.empty(K, num_blocks, D, size), v=torch.empty(K, num_blocks, size, D))
            for _ in range(self._shape.num_layers)
        ]

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


def _copy(sources: Sequence[object], destinations: Sequence[object], pairs: Sequence[tuple[int, int]]) -> None:
    for source, destination in zip(sources, destinations, strict=True):
        assert isinstance(source, ToyCache)
        assert isinstance(destination, ToyCache)
        for i, j in pairs:
            for tensor, copy in ((source.k, destination.k), (source.v, destination.v)):
                copy[:, j] = tensor[:, i].to(copy.device)
