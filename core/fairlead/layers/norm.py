"""Normalisation layers."""

import torch

from fairlead.layers.context import BuildContext


class RMSNorm(torch.nn.Module):
    """Root mean square norm. With a residual, adds it first and returns (normed, sum)."""

    def __init__(self, size: int, eps: float, ctx: BuildContext) -> None:
        super().__init__()
        self._norm, self._add_norm = ctx.ops.rms_norm, ctx.ops.fused_add_rms_norm
        self.weight = ctx.weight(size)
        self.eps = eps

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        return self._norm(x_TE, self.weight, self.eps)

    def add(self, x_TE: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        return self._add_norm(x_TE, residual_TE, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Layer norm, with a learned weight and bias or without."""

    def __init__(
        self, size: int, eps: float, ctx: BuildContext, *, bias: bool = True, elementwise_affine: bool = True
    ) -> None:
        super().__init__()
        self._norm = ctx.ops.layer_norm
        self.weight = ctx.weight(size) if elementwise_affine else torch.ones(size, dtype=ctx.dtype, device=ctx.device)
        self.bias = ctx.weight(size) if elementwise_affine and bias else None
        self.eps = eps

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        return self._norm(x_NE, self.weight, self.bias, self.eps)
