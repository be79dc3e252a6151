"""Attention through FlashInfer, where it is installed.

Shapes: T packed tokens, S sequences, H query heads, K kv-heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, KVCache, MemoryAllocator
from fairlead.ops.attention import SlotCache, SlotCacheOwner
from fairlead_triton.device.varlen import refusals

NAME = "flashinfer"
_WORKSPACE_BYTES = 128 * 2**20  # what its documentation gives a wrapper


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    slot_mapping_T: torch.Tensor
    wrapper: Any


class FlashInferAttention(SlotCacheOwner):
    """AttentionBackend on its wrapper for prompts over a paged cache, which takes decodes as prompts of one token.

    A plan has a wrapper of its own, since the next step is planned while this one runs; they share the workspace, for
    the steps run one after the other.
    """

    name = NAME

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator, device: torch.device, library: Any) -> None:
        """Raises ConfigError, with all reasons, where the library cannot serve the shape."""
        reasons = refusals(shape)
        if shape.spec.value_size is not None:
            reasons.append("keys that hold the values")
        if shape.spec.alibi_slopes is not None:
            reasons.append("ALiBi slopes of a model's own")
        if reasons:
            raise ConfigError(f"attention backend {NAME!r} does not take {'; '.join(reasons)}")
        super().__init__(shape, allocator)
        self._library, self._device = library, device
        self._workspace: torch.Tensor | None = None

    def plan(self, metadata: AttentionMetadata) -> object:
        """Lets the library plan; the last block of each sequence tells how far its context reaches."""
        if self._workspace is None:
            self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        size, spec = self.shape.block_size, self.spec
        num_blocks_S = -(-metadata.seq_lens_S // size)
        is_used_SB = np.arange(metadata.block_tables_SB.shape[1]) < num_blocks_S[:, None]
        wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        wrapper.plan(
            _starts(metadata.query_lens_S),
            _starts(num_blocks_S),
            torch.from_numpy(metadata.block_tables_SB[is_used_SB]).to(self._device),
            torch.from_numpy((metadata.seq_lens_S - 1) % size + 1),
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_size,
            size,
            causal=True,
            sm_scale=spec.scale,
            window_left=-1 if spec.sliding_window is None else spec.sliding_window - 1,
            logits_soft_cap=spec.soft_cap,
            q_data_type=self._dtype,
            kv_data_type=self._dtype,
        )
        slots_T = torch.from_numpy(metadata.slot_mapping_T).to(self._device).long()
        return _Plan(slot_mapping_T=slots_T, wrapper=wrapper)

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
        out_THD: torch.Tensor = plan.wrapper.run(q_THD.contiguous(), (kv_cache.k.view(blocks), kv_cache.v.view(blocks)))
        return out_THD


def _starts(lens_S: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lens_S))).astype(np.int32))
