"""Gates, rotation, gathers and copies: nothing is summed, so results do not depend on the batch.

Shapes: T tokens, N rows, F feed-forward width, H query heads, K kv-heads, D head size, V vocabulary, E width,
P positions.
"""

from collections.abc import Sequence

import torch

from fairlead_triton.kernels import elementwise as kernels
from fairlead_triton.launch import power_of_two, rows_of
from fairlead_triton.tuning import Tuning

Tensor = torch.Tensor
_WORD_BYTES = 4


class Elementwise:
    """The ops of `fairlead.ops.reference` of these names, and `copy_blocks` for attention backends."""

    def __init__(self, tuning: Tuning) -> None:
        self._gate, self._rotary = tuning.of("gate"), tuning.of("rotary")
        self._embedding, self._copy = tuning.of("embedding"), tuning.of("copy_blocks")

    def silu_and_mul(self, x_N2F: Tensor) -> Tensor:
        """See the reference."""
        return self._gate_and_mul(x_N2F, kernels.SILU.value)

    def gelu_and_mul(self, x_N2F: Tensor) -> Tensor:
        """See the reference."""
        return self._gate_and_mul(x_N2F, kernels.GELU_TANH.value)

    def _gate_and_mul(self, x_N2F: Tensor, gate: int) -> Tensor:
        width = x_N2F.shape[-1] // 2
        out_NF = torch.empty((*x_N2F.shape[:-1], width), dtype=x_N2F.dtype, device=x_N2F.device)
        x_N2F, num_rows, inner, outer_stride, inner_stride = rows_of(x_N2F)
        if out_NF.numel():
            block = self._gate["block"]
            kernels.gate_and_mul_kernel[(num_rows, -(-width // block))](
                x_N2F,
                out_NF,
                width,
                inner,
                outer_stride,
                inner_stride,
                BLOCK=block,
                GATE=gate,
                num_warps=self._gate["num_warps"],
            )
        return out_NF

    def rotary_embedding(
        self, q_THD: Tensor, k_TKD: Tensor, positions_T: Tensor, cos_PD: Tensor, sin_PD: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        """See the reference; sums are rounded once, at the end."""
        q_THD, k_TKD = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_THD, k_TKD))
        assert cos_PD.stride() == sin_PD.stride()
        assert cos_PD.stride(-1) == 1
        num_tokens, num_q_heads, head_size = q_THD.shape
        num_k_heads = k_TKD.shape[1]
        q_out = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        k_out = torch.empty(k_TKD.shape, dtype=k_TKD.dtype, device=k_TKD.device)
        if num_tokens:
            block = power_of_two(head_size // 2)
            heads = max(1, min(self._rotary["block_elements"] // block, power_of_two(num_q_heads)))
            kernels.rotary_kernel[(num_tokens, -(-num_q_heads // heads) + -(-num_k_heads // heads))](
                q_THD,
                k_TKD,
                positions_T,
                cos_PD,
                sin_PD,
                q_out,
                k_out,
                num_q_heads,
                num_k_heads,
                head_size // 2,
                q_THD.stride(0),
                q_THD.stride(1),
                k_TKD.stride(0),
                k_TKD.stride(1),
                cos_PD.stride(0),
                HEADS=heads,
                BLOCK=block,
                INTERLEAVED=interleaved,
                num_warps=self._rotary["num_warps"],
            )
        return q_out, k_out

    def embedding(self, token_ids_T: Tensor, weight_VE: Tensor) -> Tensor:
        """See the reference."""
        width = weight_VE.shape[1]
        out = torch.empty((*token_ids_T.shape, width), dtype=weight_VE.dtype, device=weight_VE.device)
        if token_ids_T.dim() != 1:
            token_ids_T = token_ids_T.reshape(-1)
        if weight_VE.stride(1) != 1:
            weight_VE = weight_VE.contiguous()
        if out.numel():
            block = self._embedding["block"]
            kernels.embedding_kernel[(len(token_ids_T), -(-width // block))](
                token_ids_T,
                weight_VE,
                out,
                width,
                token_ids_T.stride(0),
                weight_VE.stride(0),
                BLOCK=block,
                num_warps=self._embedding["num_warps"],
            )
        return out

    def copy_blocks(self, sources: Sequence[Tensor], targets: Sequence[Tensor], pairs_P2: Tensor) -> None:
        """Copies block pairs_P2[p, 0] of every source to block pairs_P2[p, 1] of the target of the same place, at once.

        Sources and targets are caches of one shape and dtype, (blocks, …) with the blocks along the first dimension and
        each of them contiguous; they may be the same tensors. `pairs_P2` is int64, on the device; no block is in it as
        a target twice, nor as both. Host memory will do if it is pinned, where the device reads that by its address.
        """
        first, other = sources[0], targets[0]
        block_bytes = first[0].numel() * first.element_size()
        strides = [cache.stride(0) * cache.element_size() for cache in (first, other)]
        for cache, like in (*((s, first) for s in sources), *((t, other) for t in targets)):
            same = cache.shape[1:] == first.shape[1:] and cache.dtype == first.dtype and cache.stride() == like.stride()
            assert same, "caches of one shape, dtype and layout"
            assert cache[:1].is_contiguous(), "blocks that are contiguous"
        assert not any(n % _WORD_BYTES for n in (block_bytes, *strides)), "blocks of whole words"
        if len(pairs_P2) == 0 or not sources:
            return
        addresses = torch.tensor(
            [[cache.data_ptr() for cache in caches] for caches in (sources, targets)], dtype=torch.int64
        ).to(pairs_P2.device, non_blocking=True)
        words, block = block_bytes // _WORD_BYTES, self._copy["block"]
        kernels.copy_blocks_kernel[(len(pairs_P2), len(sources), -(-words // block))](
            addresses[0],
            addresses[1],
            pairs_P2.contiguous(),
            words,
            strides[0] // _WORD_BYTES,
            strides[1] // _WORD_BYTES,
            BLOCK=block,
            num_warps=self._copy["num_warps"],
        )
