"""Rows rounded to 8 bits, each by its own largest value.

Shapes: N rows, I width.
"""

from dataclasses import dataclass

import torch

from fairlead_triton.kernels import quantise as kernels
from fairlead_triton.kernels import rounding
from fairlead_triton.launch import power_of_two, rows_of
from fairlead_triton.tuning import Tuning

EIGHT_BITS: dict[torch.dtype, int] = {
    torch.int8: rounding.INT8.value,
    torch.float8_e4m3fn: rounding.FP8_FN.value,
    torch.float8_e4m3fnuz: rounding.FP8_FNUZ.value,
}
"""The kernels' numbers of the kinds of 8 bits."""

LARGEST: dict[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantised:
    """Values (N, I) of 8 bits and scales (N,) in float32: row n is values[n] * scales[n]."""

    values: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def empty(cls, x: torch.Tensor, dtype: torch.dtype) -> "Quantised":
        """Room for x, of any number of leading dimensions, in that dtype."""
        values = torch.empty(x.shape, dtype=dtype, device=x.device)
        return cls(values=values, scales=torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))

    def raw(self) -> torch.Tensor:
        """The values as kernels write them: floats as the bits of uint8."""
        return self.values if self.values.dtype == torch.int8 else self.values.view(torch.uint8)


class RowQuantiser:
    """Rounds rows. A row is one program's own: results do not depend on the batch."""

    def __init__(self, tuning: Tuning) -> None:
        self._settings = tuning.of("quantise_rows")

    def __call__(self, x_NI: torch.Tensor, dtype: torch.dtype) -> Quantised:
        """Symmetric: the largest value of a row becomes the largest of the dtype, halves are rounded to even."""
        out = Quantised.empty(x_NI, dtype)
        x_NI, num_rows, inner, outer_stride, inner_stride = rows_of(x_NI)
        width = x_NI.shape[-1]
        if num_rows:
            kernels.quantise_rows_kernel[(num_rows,)](
                x_NI,
                out.raw(),
                out.scales,
                width,
                inner,
                outer_stride,
                inner_stride,
                BLOCK=min(power_of_two(width), self._settings["block"]),
                QUANT=EIGHT_BITS[dtype],
                num_warps=self._settings["num_warps"],
            )
        return out
