"""Phi-3, Phi-3.5 and Phi-4: Llama with a sliding window, and with LongRoPE for long contexts.

Its checkpoints hold qkv_proj and gate_up_proj merged, as they are computed here.
Source: Abdin et al., "Phi-3 Technical Report" (2024), section 2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fairlead.layers.decoder import AttentionOptions
from fairlead.layers.rotary import rope_params
from fairlead.models.config import optional_positive_int, refuse
from fairlead.models.llama import LlamaForCausalLM


class Phi3ForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }

    def attention_options(self, index: int) -> AttentionOptions:
        refuse(rope_params(self.config), "rope_type", "default", "longrope")
        window = optional_positive_int(self.config, "sliding_window")
        return replace(super().attention_options(index), sliding_window=window)
