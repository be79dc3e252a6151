"""Low-rank adapters of mixed rows.

Shapes: N rows, I inputs, O outputs, L adapters, R rank.
Results do not depend on the batch: rows of other adapters are zeros in a row's products, in tiles of one size.
"""

import torch

from fairlead_triton.kernels import lora as kernels
from fairlead_triton.launch import power_of_two
from fairlead_triton.tuning import Tuning

Tensor = torch.Tensor


class Lora:
    """The ops of `fairlead.ops.reference` of these names."""

    def __init__(self, tuning: Tuning) -> None:
        self._shrink, self._expand = tuning.of("lora_shrink"), tuning.of("lora_expand")

    def lora_shrink(self, x_NI: Tensor, a_LRI: Tensor, adapter_N: Tensor) -> Tensor:
        """See the reference; products of 16-bit numbers, sums in float32."""
        x_NI, a_LRI = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_NI, a_LRI))
        (num_rows, num_inputs), rank = x_NI.shape, a_LRI.shape[1]
        h_NR = torch.empty((num_rows, rank), dtype=torch.float32, device=x_NI.device)
        if h_NR.numel():
            block_m, block_r = self._shrink["block_m"], min(max(power_of_two(rank), 16), self._shrink["block_r"])
            kernels.lora_shrink_kernel[(-(-num_rows // block_m), -(-rank // block_r))](
                x_NI,
                a_LRI,
                adapter_N.contiguous(),
                h_NR,
                num_rows,
                rank,
                num_inputs,
                x_NI.stride(0),
                a_LRI.stride(0),
                a_LRI.stride(1),
                BLOCK_M=block_m,
                BLOCK_R=block_r,
                BLOCK_K=self._shrink["block_k"],
                num_warps=self._shrink["num_warps"],
                num_stages=self._shrink["num_stages"],
            )
        return h_NR

    def lora_expand(self, y_NO: Tensor, h_NR: Tensor, b_LOR: Tensor, adapter_N: Tensor) -> Tensor:
        """See the reference."""
        y_NO, h_NR, b_LOR = (t if t.stride(-1) == 1 else t.contiguous() for t in (y_NO, h_NR, b_LOR))
        (num_rows, num_outputs), rank = y_NO.shape, h_NR.shape[1]
        out_NO = torch.empty(y_NO.shape, dtype=y_NO.dtype, device=y_NO.device)
        if out_NO.numel():
            block_m, block_n = self._expand["block_m"], self._expand["block_n"]
            kernels.lora_expand_kernel[(-(-num_rows // block_m), -(-num_outputs // block_n))](
                y_NO,
                h_NR,
                b_LOR,
                adapter_N.contiguous(),
                out_NO,
                num_rows,
                rank,
                num_outputs,
                y_NO.stride(0),
                h_NR.stride(0),
                b_LOR.stride(0),
                b_LOR.stride(1),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_R=min(max(power_of_two(rank), 16), self._expand["block_r"]),
                num_warps=self._expand["num_warps"],
                num_stages=self._expand["num_stages"],
            )
        return out_NO
