"""Gemma 3, text: Gemma 2 with norms of q and k in place of the soft cap, and rotary settings of their own for the
layers with a window, five of six.

Source: Gemma Team, "Gemma 3 Technical Report" (2025), section 2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fairlead.errors import UnsupportedModelError
from fairlead.layers.decoder import AttentionOptions
from fairlead.layers.rotary import rope_params
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import layer_windows, positive_int, refuse
from fairlead.models.gemma2 import Gemma2ForCausalLM


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        **Gemma2ForCausalLM.defaults,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }

    def attention(self, index: int) -> SelfAttention:
        attention = super().attention(index)
        attention.q_norm, attention.k_norm = self.norm(self.shape.head_size), self.norm(self.shape.head_size)
        return attention

    def attention_options(self, index: int) -> AttentionOptions:
        refuse(self.config, "attn_logit_softcapping")
        is_local = self.windows()[index] is not None
        return replace(super().attention_options(index), rotary=self.rotary(self._rope_params(is_local)))

    def windows(self) -> tuple[int | None, ...]:
        pattern = positive_int(self.config, "sliding_window_pattern", 6)
        return layer_windows(self.config, self.shape.num_layers, lambda i: (i + 1) % pattern != 0)

    def _rope_params(self, is_local: bool) -> dict[str, Any]:
        """By layer type in rope_parameters, or, as older files have it, rope_local_base_freq beside rope_theta."""
        nested = self.config.get("rope_parameters") or {}
        for key in nested:
            if key not in ("full_attention", "sliding_attention"):
                raise UnsupportedModelError(
                    f"config.json: rope_parameters {key!r} is not supported; it is by layer type"
                )
        if is_local:
            params = nested.get("sliding_attention")
            theta = self.config.get("rope_local_base_freq", 10_000.0)
        else:
            params = nested.get("full_attention") or self.config.get("rope_scaling")
            theta = self.config.get("rope_theta", 1_000_000.0)
        return rope_params({**self.config, "rope_parameters": params, "rope_scaling": None, "rope_theta": theta})
