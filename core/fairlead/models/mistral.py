"""Mistral: Llama with a sliding window in every layer, or in none.

Source: Jiang et al., "Mistral 7B" (2023), section 2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fairlead.layers.decoder import AttentionOptions
from fairlead.models.config import optional_positive_int, refuse
from fairlead.models.llama import LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }

    def attention_options(self, index: int) -> AttentionOptions:
        refuse(self.config, "layer_types")
        window = optional_positive_int(self.config, "sliding_window")
        return replace(super().attention_options(index), sliding_window=window)
