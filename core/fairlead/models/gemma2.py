"""Gemma 2: Gemma with norms on both sides of each part, soft-capped logits and a sliding window in every other layer.

Source: Gemma Team, "Gemma 2" (2024), section 2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fairlead.layers.decoder import AttentionOptions, SandwichLayer
from fairlead.models.config import layer_windows, optional_positive_number, positive_number
from fairlead.models.gemma import GemmaForCausalLM


class Gemma2ForCausalLM(GemmaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        **GemmaForCausalLM.defaults,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }

    def layer(self, index: int) -> torch.nn.Module:
        E = self.shape.hidden_size
        norms = (self.norm(E), self.norm(E), self.norm(E), self.norm(E))
        return SandwichLayer(self.attention(index), self.mlp(index), norms)

    def attention_options(self, index: int) -> AttentionOptions:
        return replace(
            super().attention_options(index),
            scale=positive_number(self.config, "query_pre_attn_scalar") ** -0.5,
            sliding_window=self.windows()[index],
            soft_cap=optional_positive_number(self.config, "attn_logit_softcapping"),
        )

    def windows(self) -> tuple[int | None, ...]:
        return layer_windows(self.config, self.shape.num_layers, lambda i: i % 2 == 0)
