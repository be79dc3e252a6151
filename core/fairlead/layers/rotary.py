"""Rotary position embedding and its published scalings."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fairlead.errors import UnsupportedModelError
from fairlead.layers.context import BuildContext

SUPPORTED = ("default", "linear", "llama3")


class Rotary(torch.nn.Module):
    """Rotates q (T, H, D) and k (T, K, D) by their positions, from a table made once for the whole context.

    With a `partial_rotary_factor` only the first `rotary_size` of the D dimensions are rotated. `interleaved` pairs
    neighbouring dimensions, as GPT-J and ChatGLM do, instead of the two halves.
    """

    def __init__(
        self, head_size: int, params: Mapping[str, Any], ctx: BuildContext, *, interleaved: bool = False
    ) -> None:
        super().__init__()
        self._rotate = ctx.ops.rotary_embedding
        self._interleaved = interleaved
        self._is_partial = params["partial_rotary_factor"] != 1
        self.rotary_size = int(head_size * params["partial_rotary_factor"])
        if not 0 < self.rotary_size <= head_size or self.rotary_size % 2:
            raise UnsupportedModelError(
                f"partial_rotary_factor {params['partial_rotary_factor']} rotates {self.rotary_size} of {head_size} "
                "dimensions; it must be an even number of them"
            )
        positions = torch.arange(ctx.max_model_len, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(self.rotary_size, params))
        angles = angles.repeat_interleave(2, dim=1) if interleaved else angles.repeat(1, 2)
        self.cos_PD = angles.cos().to(ctx.device, ctx.dtype)
        self.sin_PD = angles.sin().to(ctx.device, ctx.dtype)

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._is_partial:
            return self._rotate(q_THD, k_TKD, positions_T, self.cos_PD, self.sin_PD, self._interleaved)
        q, q_rest = q_THD.tensor_split((self.rotary_size,), dim=-1)
        k, k_rest = k_TKD.tensor_split((self.rotary_size,), dim=-1)
        q, k = self._rotate(q, k, positions_T, self.cos_PD, self.sin_PD, self._interleaved)
        return torch.cat((q, q_rest), dim=-1), torch.cat((k, k_rest), dim=-1)


def rope_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, in either spelling (rope_parameters, or rope_theta with rope_scaling)."""
    params = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    params.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    params.setdefault("rope_type", params.get("type", "default"))
    partial = config.get("partial_rotary_factor")
    params.setdefault("partial_rotary_factor", 1.0 if partial is None else partial)
    return params


def inverse_frequencies(head_size: int, params: Mapping[str, Any]) -> torch.Tensor:
    """Angle per position of each pair of dimensions, (D/2,) in float32."""
    kind = params["rope_type"]
    if kind not in SUPPORTED:
        raise UnsupportedModelError(f"rope_type {kind!r} is not supported; supported: {', '.join(SUPPORTED)}")
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    inv_freq: torch.Tensor = 1.0 / (params["rope_theta"] ** exponents)
    if kind == "linear":
        inv_freq = inv_freq / params["factor"]
    return _llama3(inv_freq, params) if kind == "llama3" else inv_freq


def _llama3(inv_freq: torch.Tensor, params: Mapping[str, Any]) -> torch.Tensor:
    """Stretches slow rotations by `factor`, leaves fast ones, and blends between.

    Source: Meta, llama-models, `apply_scaling` of Llama 3.1.
    """
    factor, low, high = params["factor"], params["low_freq_factor"], params["high_freq_factor"]
    original = params["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    is_between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(is_between, blended, scaled)
