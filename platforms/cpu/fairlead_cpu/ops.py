"""The CPU's op providers: native kernels, and torch's fused ones for a package that was built without."""

import torch
from torch.nn import functional

from fairlead.interface import OpProvider
from fairlead_cpu.native import Kernels
from fairlead_cpu.native_lora import lora_providers
from fairlead_cpu.native_ops import native_providers
from fairlead_cpu.native_sampling import sampling_providers


def rms_norm(x_NE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """Torch's one-pass kernel in place of the reference's five."""
    return functional.rms_norm(x_NE, (x_NE.shape[-1],), weight_E, eps)


def fused_add_rms_norm(
    x_NE: torch.Tensor, residual_NE: torch.Tensor, weight_E: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds, then norms in one pass."""
    total = x_NE + residual_NE
    return rms_norm(total, weight_E, eps), total


TORCH = {
    "rms_norm": OpProvider(name="torch", fn=rms_norm),
    "fused_add_rms_norm": OpProvider(name="torch", fn=fused_add_rms_norm),
}


def providers(kernels: Kernels | None) -> dict[str, tuple[OpProvider, ...]]:
    """Of each op, in the order of preference."""
    native: dict[str, OpProvider] = {}
    if kernels is not None:
        native = native_providers(kernels) | sampling_providers(kernels) | lora_providers(kernels)
    return {name: tuple(p[name] for p in (native, TORCH) if name in p) for name in (*native, *TORCH)}
