"""Norms, alone and with their results rounded to 8 bits for a product that follows.

Shapes: N rows (of any number of leading dimensions), E width.
A row is one program's own, held whole and summed in a fixed order: results do not depend on the batch.
"""

from dataclasses import dataclass

import torch

from fairlead_triton.kernels import norm as kernels
from fairlead_triton.launch import power_of_two, rows_of
from fairlead_triton.quantise import EIGHT_BITS, Quantised
from fairlead_triton.tuning import Tuning

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """How a width is cut into programs."""

    rows: int
    block: int
    num_warps: int


class Norms:
    """The norms of `fairlead.ops.reference`, and their variants `…_quantised`, which return 8 bits and scales."""

    def __init__(self, tuning: Tuning) -> None:
        self._settings = tuning.of("norm")
        self._shapes: dict[int, _Shape] = {}

    def rms_norm(self, x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """See the reference."""
        out_NE = _like(x_NE, weight_E)
        self._rms(x_NE, None, weight_E, eps, out_NE, None, gemma=False)
        return out_NE

    def gemma_rms_norm(self, x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
        """See the reference."""
        out_NE = torch.empty(x_NE.shape, dtype=x_NE.dtype, device=x_NE.device)
        self._rms(x_NE, None, weight_E, eps, out_NE, None, gemma=True)
        return out_NE

    def fused_add_rms_norm(
        self, x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See the reference."""
        total_NE = torch.empty(x_NE.shape, dtype=x_NE.dtype, device=x_NE.device)
        out_NE = _like(x_NE, weight_E)
        self._rms(x_NE, residual_NE, weight_E, eps, out_NE, total_NE, gemma=False)
        return out_NE, total_NE

    def layer_norm(self, x_NE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float) -> Tensor:
        """See the reference."""
        out_NE = torch.empty(x_NE.shape, dtype=x_NE.dtype, device=x_NE.device)
        self._layer(x_NE, weight_E, bias_E, eps, out_NE, None, 0)
        return out_NE

    def rms_norm_quantised(self, x_NE: Tensor, weight_E: Tensor, eps: float, dtype: torch.dtype) -> Quantised:
        """`rms_norm`, then `quantise_rows` to that dtype: one reading of x, and half or a quarter of the writing."""
        out = Quantised.empty(x_NE, dtype)
        self._rms(x_NE, None, weight_E, eps, None, None, gemma=False, quantised=out)
        return out

    def gemma_rms_norm_quantised(self, x_NE: Tensor, weight_E: Tensor, eps: float, dtype: torch.dtype) -> Quantised:
        """`gemma_rms_norm`, then `quantise_rows` to that dtype."""
        out = Quantised.empty(x_NE, dtype)
        self._rms(x_NE, None, weight_E, eps, None, None, gemma=True, quantised=out)
        return out

    def fused_add_rms_norm_quantised(
        self, x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Quantised, Tensor]:
        """`fused_add_rms_norm`, its first result rounded by `quantise_rows` to that dtype."""
        total_NE = torch.empty(x_NE.shape, dtype=x_NE.dtype, device=x_NE.device)
        out = Quantised.empty(x_NE, dtype)
        self._rms(x_NE, residual_NE, weight_E, eps, None, total_NE, gemma=False, quantised=out)
        return out, total_NE

    def layer_norm_quantised(
        self, x_NE: Tensor, weight_E: Tensor, bias_E: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Quantised:
        """`layer_norm`, then `quantise_rows` to that dtype."""
        out = Quantised.empty(x_NE, dtype)
        self._layer(x_NE, weight_E, bias_E, eps, out.raw(), out.scales, EIGHT_BITS[dtype])
        return out

    def _rms(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight_E: Tensor,
        eps: float,
        out: Tensor | None,
        total: Tensor | None,
        *,
        gemma: bool,
        quantised: Quantised | None = None,
    ) -> None:
        x, num_rows, inner, outer_stride, inner_stride = rows_of(x)
        residual_strides = (0, 0)
        if residual is not None:
            residual, _, _, *residual_strides_list = rows_of(residual)
            residual_strides = (residual_strides_list[0], residual_strides_list[1])
        if num_rows == 0:
            return
        shape = self._shape(x.shape[-1])
        kernels.rms_norm_kernel[(-(-num_rows // shape.rows),)](
            x,
            residual,
            weight_E,
            out if quantised is None else quantised.raw(),
            total,
            None if quantised is None else quantised.scales,
            num_rows,
            x.shape[-1],
            inner,
            outer_stride,
            inner_stride,
            *residual_strides,
            eps,
            ROWS=shape.rows,
            BLOCK=shape.block,
            HAS_RESIDUAL=residual is not None,
            GEMMA=gemma,
            QUANT=0 if quantised is None else EIGHT_BITS[quantised.values.dtype],
            num_warps=shape.num_warps,
        )

    def _layer(
        self,
        x: Tensor,
        weight_E: Tensor,
        bias_E: Tensor | None,
        eps: float,
        out: Tensor,
        scales: Tensor | None,
        quant: int,
    ) -> None:
        x, num_rows, inner, outer_stride, inner_stride = rows_of(x)
        if num_rows == 0:
            return
        shape = self._shape(x.shape[-1])
        kernels.layer_norm_kernel[(-(-num_rows // shape.rows),)](
            x,
            weight_E,
            bias_E,
            out,
            scales,
            num_rows,
            x.shape[-1],
            inner,
            outer_stride,
            inner_stride,
            eps,
            ROWS=shape.rows,
            BLOCK=shape.block,
            HAS_BIAS=bias_E is not None,
            QUANT=quant,
            num_warps=shape.num_warps,
        )

    def _shape(self, width: int) -> _Shape:
        shape = self._shapes.get(width)
        if shape is None:
            block = power_of_two(width)
            rows = max(1, self._settings["row_elements"] // block)
            num_warps = rows * block // (32 * self._settings["elements_per_thread"])
            num_warps = min(max(num_warps, 1), self._settings["max_warps"])
            shape = self._shapes[width] = _Shape(rows=rows, block=block, num_warps=num_warps)
        return shape


def _like(x: Tensor, weight: Tensor) -> Tensor:
    """An empty, contiguous tensor of x's shape for x times the weight."""
    dtype = x.dtype if x.dtype == weight.dtype else torch.promote_types(x.dtype, weight.dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)
