"""Launches of the products of `kernels.matmul`, in tiles that the number of rows and the tuning table give.

Shapes: N rows, I inputs, O outputs, G groups of inputs.
"""

import torch
from torch.nn import functional

from fairlead_triton.kernels import matmul as kernels
from fairlead_triton.quantise import Quantised
from fairlead_triton.tuning import Settings, Tuning

Tensor = torch.Tensor

INT4_HALF = 64
"""Bytes of a group of 128 inputs of 4 bits."""


class Matmul:
    """Products of rows with weights. Those of few rows use smaller tiles, for which the sums of floats run in another
    order where the device's units do: only integers' results (`int8`) never depend on the batch."""

    def __init__(self, tuning: Tuning) -> None:
        self._skinny = tuning.of("matmul_skinny")
        self._eight_bit = tuning.of("matmul_8_bit_small"), tuning.of("matmul_8_bit")
        self._int4 = tuning.of("matmul_int4_small"), tuning.of("matmul_int4")

    def linear(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The reference's `linear`: up to `max_rows` rows by a kernel that is as fast as memory, more by torch."""
        settings = self._skinny
        is_plain = x_NI.dim() == 2 and x_NI.dtype == weight_OI.dtype and weight_OI.stride(1) == 1
        if not is_plain or not 0 < len(x_NI) <= settings["max_rows"]:
            return functional.linear(x_NI, weight_OI, bias_O)
        if x_NI.stride(1) != 1:
            x_NI = x_NI.contiguous()
        (num_rows, num_inputs), num_outputs = x_NI.shape, len(weight_OI)
        out_NO = torch.empty((num_rows, num_outputs), dtype=x_NI.dtype, device=x_NI.device)
        # Few outputs in wide tiles would leave processors idle.
        is_narrow = num_outputs < settings["programs"] * settings["block_n"]
        block_n = max(16, settings["block_n"] // 2) if is_narrow else settings["block_n"]
        block_m = settings["block_m"]
        kernels.skinny_kernel[(-(-num_rows // block_m) * -(-num_outputs // block_n),)](
            x_NI,
            weight_OI,
            bias_O,
            out_NO,
            num_rows,
            num_outputs,
            num_inputs,
            x_NI.stride(0),
            weight_OI.stride(0),
            HAS_BIAS=bias_O is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=settings["block_k"] * 2 // x_NI.element_size(),
            num_warps=settings["num_warps"],
            num_stages=settings["num_stages"],
        )
        return out_NO

    def eight_bit(
        self, rows: Quantised, weight_OI: Tensor, scales_O: Tensor, bias_O: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """(N, O) in `dtype`. The weight's rows may be longer than I."""
        num_rows, num_inputs = rows.values.shape
        num_outputs = len(weight_OI)
        out_NO = torch.empty((num_rows, num_outputs), dtype=dtype, device=weight_OI.device)
        if num_rows:
            settings = _by_rows(self._eight_bit, num_rows)
            kernels.eight_bit_kernel[_grid(settings, num_rows, num_outputs)](
                rows.values,
                rows.scales,
                weight_OI,
                scales_O,
                bias_O,
                out_NO,
                num_rows,
                num_outputs,
                num_inputs,
                weight_OI.stride(0),
                HAS_BIAS=bias_O is not None,
                IS_INT=weight_OI.dtype == torch.int8,
                BLOCK_M=settings["block_m"],
                BLOCK_N=settings["block_n"],
                BLOCK_K=settings["block_k"],
                GROUP_M=settings["group_m"],
                num_warps=settings["num_warps"],
                num_stages=settings["num_stages"],
            )
        return out_NO

    def int4(self, x_NI: Tensor, weight: Tensor, scales_OG: Tensor, bias_O: Tensor | None) -> Tensor:
        """(N, O) in x's dtype of 16 bits. The weight is uint8 (O, G * INT4_HALF), see `kernels.matmul.int4_kernel`."""
        (num_rows, num_inputs), (num_outputs, num_groups) = x_NI.shape, scales_OG.shape
        out_NO = torch.empty((num_rows, num_outputs), dtype=x_NI.dtype, device=x_NI.device)
        if x_NI.stride(1) != 1:
            x_NI = x_NI.contiguous()
        if num_rows:
            settings = _by_rows(self._int4, num_rows)
            kernels.int4_kernel[_grid(settings, num_rows, num_outputs)](
                x_NI,
                weight,
                scales_OG,
                bias_O,
                out_NO,
                num_rows,
                num_outputs,
                num_inputs,
                x_NI.stride(0),
                num_groups,
                HAS_BIAS=bias_O is not None,
                BLOCK_M=settings["block_m"],
                BLOCK_N=settings["block_n"],
                HALF=INT4_HALF,
                GROUP_M=settings["group_m"],
                num_warps=settings["num_warps"],
                num_stages=settings["num_stages"],
            )
        return out_NO


def _by_rows(small_and_large: tuple[Settings, Settings], num_rows: int) -> Settings:
    small, large = small_and_large
    return small if num_rows <= small["max_rows"] else large


def _grid(settings: Settings, num_rows: int, num_outputs: int) -> tuple[int]:
    return (-(-num_rows // settings["block_m"]) * -(-num_outputs // settings["block_n"]),)
