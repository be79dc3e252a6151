"""Attention through a library with the signature of `flash_attn_varlen_func`: flash-attn's, and AITER's.

Shapes: T packed tokens, S sequences, H query heads, K kv-heads, D head size, B blocks of a table.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, KVCache, MemoryAllocator
from fairlead.ops.attention import SlotCache, SlotCacheOwner

Varlen = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    slot_mapping_T: torch.Tensor
    query_ends_S1: torch.Tensor  # from 0 on
    key_ends_S1: torch.Tensor
    block_tables_SB: torch.Tensor
    max_query_len: int
    max_seq_len: int


class VarlenAttention(SlotCacheOwner):
    """AttentionBackend that writes keys and values by slot and leaves the rest to the library."""

    def __init__(
        self,
        name: str,
        varlen: Varlen,
        shape: AttentionShape,
        allocator: MemoryAllocator,
        device: torch.device,
        *,
        block_multiple: int,
    ) -> None:
        """The library takes blocks of multiples of `block_multiple` tokens. Raises ConfigError, with all reasons,
        where it cannot serve the shape."""
        self.name = name
        reasons = refusals(shape)
        if shape.block_size % block_multiple:
            reasons.append(f"blocks of {shape.block_size} tokens (multiples of {block_multiple} only)")
        if shape.spec.value_size is not None:
            reasons.append("keys that hold the values")
        if reasons:
            raise ConfigError(f"attention backend {name!r} does not take {'; '.join(reasons)}")
        super().__init__(shape, allocator)
        self._varlen, self._device = varlen, device
        slopes = self.spec.alibi_slopes
        self._slopes = None if slopes is None else torch.tensor(slopes, dtype=torch.float32, device=device)
        window = self.spec.sliding_window
        self._window = (-1, -1) if window is None else (window - 1, 0)

    def plan(self, metadata: AttentionMetadata) -> object:
        """Moves the step's integers to the device."""
        query_lens_S, seq_lens_S = (torch.from_numpy(x) for x in (metadata.query_lens_S, metadata.seq_lens_S))
        return _Plan(
            slot_mapping_T=torch.from_numpy(metadata.slot_mapping_T).to(self._device).long(),
            query_ends_S1=_ends(query_lens_S).to(self._device),
            key_ends_S1=_ends(seq_lens_S).to(self._device),
            block_tables_SB=torch.from_numpy(metadata.block_tables_SB).to(self._device),
            max_query_len=int(query_lens_S.max()),
            max_seq_len=int(seq_lens_S.max()),
        )

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_cache: KVCache, plan: object
    ) -> torch.Tensor:
        """Writes, then attends."""
        assert isinstance(plan, _Plan)
        assert isinstance(kv_cache, SlotCache)
        assert v_TKD is not None
        kv_cache.k.index_copy_(0, plan.slot_mapping_T, k_TKD)
        kv_cache.v.index_copy_(0, plan.slot_mapping_T, v_TKD)
        blocks = (-1, self.shape.block_size, self.spec.num_kv_heads, self.spec.head_size)
        return self._varlen(
            q_THD.contiguous(),
            kv_cache.k.view(blocks),
            kv_cache.v.view(blocks),
            cu_seqlens_q=plan.query_ends_S1,
            cu_seqlens_k=plan.key_ends_S1,
            max_seqlen_q=plan.max_query_len,
            max_seqlen_k=plan.max_seq_len,
            softmax_scale=self.spec.scale,
            causal=True,
            window_size=self._window,
            softcap=self.spec.soft_cap or 0.0,
            alibi_slopes=self._slopes,
            block_table=plan.block_tables_SB,
        )


def refusals(shape: AttentionShape) -> list[str]:
    """What the attention libraries alike do not take."""
    spec, reasons = shape.spec, []
    if shape.dtype not in ("float16", "bfloat16"):
        reasons.append(shape.dtype)
    if spec.head_size > 256 or spec.head_size % 8:
        reasons.append(f"head size {spec.head_size} (multiples of 8 up to 256 only)")
    if shape.kv_dtype not in ("auto", shape.dtype):
        reasons.append(f"a KV cache of {shape.kv_dtype}")
    return reasons


def _ends(lens_S: torch.Tensor) -> torch.Tensor:
    ends_S1 = torch.zeros(len(lens_S) + 1, dtype=torch.int32)
    ends_S1[1:] = lens_S.cumsum(0)
    return ends_S1
