"""Edits of logits, and draws from probabilities.

Shapes: S sequences, V vocabulary, W words of a bitmask, N places, R rows that are drawn.
A row is one program's own, and its sums run in a fixed order: a draw does not depend on the batch.
"""

import torch

from fairlead_triton.kernels import sampling as kernels
from fairlead_triton.launch import power_of_two
from fairlead_triton.tuning import Tuning

Tensor = torch.Tensor


class Sampling:
    """The ops of `fairlead.ops.reference` of these names. None waits for the device."""

    def __init__(self, tuning: Tuning) -> None:
        self._edit, self._draw = tuning.of("logits"), tuning.of("draw")

    def apply_penalties(
        self, logits_SV: Tensor, index_N: Tensor, repetition_N: Tensor, frequency_N: Tensor, presence_N: Tensor
    ) -> None:
        """See the reference."""
        assert logits_SV.dtype == torch.float32
        assert logits_SV.is_contiguous()
        if len(index_N) == 0:
            return
        block = self._edit["block"]
        kernels.penalties_kernel[(-(-len(index_N) // block),)](
            logits_SV,
            *(t.contiguous() for t in (index_N, repetition_N, frequency_N, presence_N)),
            len(index_N),
            BLOCK=block,
            num_warps=self._edit["num_warps"],
        )

    def apply_token_bitmask(self, logits_SV: Tensor, bitmask_SW: Tensor) -> Tensor:
        """See the reference."""
        num_rows, num_tokens = logits_SV.shape
        out_SV = torch.empty(logits_SV.shape, dtype=logits_SV.dtype, device=logits_SV.device)
        if logits_SV.stride(1) != 1:
            logits_SV = logits_SV.contiguous()
        if num_rows:
            block = self._edit["block"]
            kernels.bitmask_kernel[(num_rows, -(-num_tokens // block))](
                logits_SV,
                bitmask_SW,
                out_SV,
                num_tokens,
                logits_SV.stride(0),
                *bitmask_SW.stride(),
                BLOCK=block,
                num_warps=self._edit["num_warps"],
            )
        return out_SV

    def draw(self, probs_RV: Tensor, uniform_R: Tensor) -> Tensor:
        """See the reference: two readings of a row."""
        probs_RV = _rows(probs_RV)
        num_rows, num_tokens = probs_RV.shape
        out_R = torch.zeros(num_rows, dtype=torch.int64, device=probs_RV.device)
        if num_rows and num_tokens > 1:
            kernels.draw_kernel[(num_rows,)](
                probs_RV,
                uniform_R.contiguous(),
                out_R,
                num_tokens,
                probs_RV.stride(0),
                BLOCK=min(self._draw["block"], power_of_two(num_tokens)),
                num_warps=self._draw["num_warps"],
            )
        return out_R

    def draw_filtered(self, probs_RV: Tensor, settings_4R: Tensor, max_top_k: int) -> Tensor:
        """See the reference. Nothing is sorted: the last probability that is kept and the one that is drawn are found
        by bisection, in some 20 readings of a row each, from the device's cache."""
        probs_RV = _rows(probs_RV)
        num_rows, num_tokens = probs_RV.shape
        out_R = torch.zeros(num_rows, dtype=torch.int64, device=probs_RV.device)
        if num_rows and num_tokens > 1:
            kernels.draw_filtered_kernel[(num_rows,)](
                probs_RV,
                settings_4R,
                out_R,
                num_tokens,
                probs_RV.stride(0),
                *settings_4R.stride(),
                BLOCK=min(self._draw["block_filtered"], power_of_two(num_tokens)),
                num_warps=self._draw["num_warps"],
            )
        return out_R


def _rows(probs_RV: Tensor) -> Tensor:
    """In float32, rows contiguous: as the sampler hands them over."""
    return probs_RV.float() if probs_RV.stride(1) == 1 else probs_RV.float().contiguous()
