"""Rotary position embedding and its published scalings."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from fairlead.errors import CheckpointError, UnsupportedModelError
from fairlead.layers.context import BuildContext
from fairlead.models.config import optional_positive_number, positive_number

SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_ALIASES = {"su": "longrope"}  # the first Phi-3 checkpoints
_UNSUPPORTED_KEYS = ("mrope_section",)  # positions in more than one dimension


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
        self.interleaved = interleaved
        factor = positive_number(params, "partial_rotary_factor")
        self._is_partial, self.rotary_size = factor != 1, int(head_size * factor)
        if not 0 < self.rotary_size <= head_size or self.rotary_size % 2:
            raise UnsupportedModelError(
                f"partial_rotary_factor {factor} rotates {self.rotary_size} of {head_size} "
                "dimensions; it must be an even number of them"
            )
        inv_freq, attention_factor = inverse_frequencies(self.rotary_size, params, max_model_len=ctx.max_model_len)
        positions = torch.arange(ctx.max_model_len, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq)
        angles = angles.repeat_interleave(2, dim=1) if interleaved else angles.repeat(1, 2)
        self.cos_PD = (angles.cos() * attention_factor).to(ctx.device, ctx.dtype)
        self.sin_PD = (angles.sin() * attention_factor).to(ctx.device, ctx.dtype)

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._is_partial:
            return self._rotate(q_THD, k_TKD, positions_T, self.cos_PD, self.sin_PD, self.interleaved)
        q, q_rest = q_THD.tensor_split((self.rotary_size,), dim=-1)
        k, k_rest = k_TKD.tensor_split((self.rotary_size,), dim=-1)
        q, k = self._rotate(q, k, positions_T, self.cos_PD, self.sin_PD, self.interleaved)
        return torch.cat((q, q_rest), dim=-1), torch.cat((k, k_rest), dim=-1)


def rope_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, in either spelling (rope_parameters, or rope_theta with rope_scaling)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: the rotary settings must be an object, got {given!r:.100}")
    params = dict(given)
    theta, partial = config.get("rope_theta"), config.get("partial_rotary_factor")
    params.setdefault("rope_theta", 10000.0 if theta is None else theta)
    params.setdefault("rope_type", params.get("type", "default"))
    params["rope_type"] = _ALIASES.get(params["rope_type"], params["rope_type"])
    params.setdefault("partial_rotary_factor", 1.0 if partial is None else partial)
    longest = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    return {**params, "max_position_embeddings": longest, "original_max_position_embeddings": original or longest}


def inverse_frequencies(
    rotary_size: int, params: Mapping[str, Any], *, max_model_len: int
) -> tuple[torch.Tensor, float]:
    """(angle per position of each pair of dimensions, (D/2,) in float32, factor on the rotated q and k).

    `dynamic` changes frequencies only beyond max_position_embeddings, which no context here exceeds.
    Raises UnsupportedModelError or CheckpointError, naming the setting.
    """
    kind = params["rope_type"]
    if kind not in SUPPORTED:
        raise UnsupportedModelError(f"rope_type {kind!r} is not supported; supported: {', '.join(SUPPORTED)}")
    for key in _UNSUPPORTED_KEYS:
        if params.get(key) is not None:
            raise UnsupportedModelError(f"rotary setting {key} is not supported; got {params[key]!r}")
    exponents = torch.arange(0, rotary_size, 2, dtype=torch.int64).float() / rotary_size
    periods: torch.Tensor = positive_number(params, "rope_theta") ** exponents
    inv_freq = 1.0 / periods
    if kind == "linear":
        return inv_freq / positive_number(params, "factor"), 1.0
    if kind == "llama3":
        return _llama3(inv_freq, params), 1.0
    if kind == "yarn":
        return _yarn(periods, rotary_size, params)
    if kind == "longrope":
        return _longrope(periods, params, max_model_len)
    return inv_freq, 1.0


def yarn_mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's correction of the attention's temperature (its equation 22), weighted as DeepSeek does."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def context_factor(params: Mapping[str, Any]) -> float:
    """How many times the original context the model was stretched to."""
    if params.get("factor") is not None:
        return positive_number(params, "factor")
    return positive_number(params, "max_position_embeddings") / positive_number(
        params, "original_max_position_embeddings"
    )


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


def _yarn(periods: torch.Tensor, rotary_size: int, params: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """Dimensions that turn less than `beta_slow` times in the original context are stretched by `factor`, those that
    turn more than `beta_fast` times are left, and a ramp lies between.

    Source: Peng et al., "YaRN" (2023), sections 3.2 to 3.4.
    """
    factor, theta = context_factor(params), positive_number(params, "rope_theta")
    original = positive_number(params, "original_max_position_embeddings")

    def dimension_of(num_turns: float) -> float:
        return rotary_size * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (dimension_of(positive_number(params, *beta)) for beta in (("beta_fast", 32), ("beta_slow", 1)))
    if params.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_size - 1)
    ramp = (torch.arange(len(periods), dtype=torch.float32) - low) / (high - low or 0.001)
    stretched = ramp.clamp(0, 1)
    attention_factor = optional_positive_number(params, "attention_factor")
    if attention_factor is None:
        attention_factor = yarn_mscale(factor)
        if params.get("mscale") and params.get("mscale_all_dim"):
            attention_factor = yarn_mscale(factor, params["mscale"]) / yarn_mscale(factor, params["mscale_all_dim"])
    return stretched / (factor * periods) + (1 - stretched) / periods, attention_factor


def _longrope(periods: torch.Tensor, params: Mapping[str, Any], max_model_len: int) -> tuple[torch.Tensor, float]:
    """Each pair of dimensions has a divisor of its own, from a list for short or for long contexts.

    Keys in the cache cannot be rotated again when a sequence grows long, so the list is chosen once: the long one
    if `max_model_len` exceeds the original context. Source: Ding et al., "LongRoPE" (2024), section 3.
    """
    original = positive_number(params, "original_max_position_embeddings")
    key = "long_factor" if max_model_len > original else "short_factor"
    divisors = params.get(key)
    if not isinstance(divisors, list) or len(divisors) != len(periods):
        raise CheckpointError(f"config.json: rotary setting {key} must be a list of {len(periods)} numbers")
    attention_factor = optional_positive_number(params, "attention_factor")
    if attention_factor is None:
        factor = context_factor(params)
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * periods), attention_factor
