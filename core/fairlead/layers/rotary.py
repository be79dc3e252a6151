"""Rotary position embedding and its published scalings."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fairlead.errors import CheckpointError, UnsupportedModelError
from fairlead.layers.context import BuildContext
from fairlead.models.config import positive_number

SUPPORTED = ("default", "linear", "llama3")


class Rotary(torch.nn.Module):
    """Rotates q (T, H, D) and k (T, K, D) by their positions, from a table made once for the whole context."""

    def __init__(self, head_size: int, params: Mapping[str, Any], ctx: BuildContext) -> None:
        super().__init__()
        self._rotate = ctx.ops.rotary_embedding
        positions = torch.arange(ctx.max_model_len, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(head_size, params)).repeat(1, 2)
        self.cos_PD = angles.cos().to(ctx.device, ctx.dtype)
        self.sin_PD = angles.sin().to(ctx.device, ctx.dtype)

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rotate(q_THD, k_TKD, positions_T, self.cos_PD, self.sin_PD)


def rope_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, in either spelling (rope_parameters, or rope_theta with rope_scaling)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: the rotary settings must be an object, got {given!r:.100}")
    params = dict(given)
    params.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    params.setdefault("rope_type", params.get("type", "default"))
    return params


def inverse_frequencies(head_size: int, params: Mapping[str, Any]) -> torch.Tensor:
    """Angle per position of each pair of dimensions, (D/2,) in float32."""
    kind = params["rope_type"]
    if kind not in SUPPORTED:
        raise UnsupportedModelError(f"rope_type {kind!r} is not supported; supported: {', '.join(SUPPORTED)}")
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    inv_freq: torch.Tensor = 1.0 / (positive_number(params, "rope_theta") ** exponents)
    if kind == "linear":
        inv_freq = inv_freq / positive_number(params, "factor")
    return _llama3(inv_freq, params) if kind == "llama3" else inv_freq


def _llama3(inv_freq: torch.Tensor, params: Mapping[str, Any]) -> torch.Tensor:
    """Stretches slow rotations by `factor`, leaves fast ones, and blends between.

    Source: Meta, llama-models, `apply_scaling` of Llama 3.1.
    """
    factor, low, high, original = (
        positive_number(params, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    if low >= high:
        raise CheckpointError(f"config.json: low_freq_factor {low} must be below high_freq_factor {high}")
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    is_between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(is_between, blended, scaled)
