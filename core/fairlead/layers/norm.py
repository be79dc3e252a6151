"""Normalisation layers."""

from typing import Protocol

import torch

from fairlead.layers.context import BuildContext


class Norm(Protocol):
    """What a decoder layer asks of its norms; `size` is the width of the rows that it normalises."""

    size: int

    def __call__(self, x_NE: torch.Tensor) -> torch.Tensor:
        """The normalised rows."""
        ...

    def add(self, x_NE: torch.Tensor, residual_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        ...


class RMSNorm(torch.nn.Module):
    """Root mean square norm. With a residual, adds it first and returns (normed, sum)."""

    def __init__(self, size: int, eps: float, ctx: BuildContext) -> None:
        super().__init__()
        self._norm, self._add_norm = ctx.ops.rms_norm, ctx.ops.fused_add_rms_norm
        self.weight = ctx.weight(size)
        self.size, self.eps = size, eps

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        return self._norm(x_NE, self.weight, self.eps)

    def add(self, x_NE: torch.Tensor, residual_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        return self._add_norm(x_NE, residual_NE, self.weight, self.eps)


class GemmaRMSNorm(torch.nn.Module):
    """Root mean square norm whose weight is stored less one. Source: Gemma's reference code, `RMSNorm`."""

    def __init__(self, size: int, eps: float, ctx: BuildContext) -> None:
        super().__init__()
        self._norm = ctx.ops.gemma_rms_norm
        self.weight = ctx.weight(size)
        self.size, self.eps = size, eps

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        return self._norm(x_NE, self.weight, self.eps)

    def add(self, x_NE: torch.Tensor, residual_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        total_NE = x_NE + residual_NE
        return self._norm(total_NE, self.weight, self.eps), total_NE


class LayerNorm(torch.nn.Module):
    """Layer norm, with a learned weight and bias or without."""

    def __init__(
        self, size: int, eps: float, ctx: BuildContext, *, bias: bool = True, elementwise_affine: bool = True
    ) -> None:
        super().__init__()
        self._norm = ctx.ops.layer_norm
        self.weight = ctx.weight(size) if elementwise_affine else torch.ones(size, dtype=ctx.dtype, device=ctx.device)
        self.bias = ctx.weight(size) if elementwise_affine and bias else None
        self.size, self.eps = size, eps

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        return self._norm(x_NE, self.weight, self.bias, self.eps)

    def add(self, x_NE: torch.Tensor, residual_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        total_NE = x_NE + residual_NE
        return self(total_NE), total_NE
