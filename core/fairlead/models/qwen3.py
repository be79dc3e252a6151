"""Qwen3: Llama with a norm over each head of q and k.

Source: "Qwen3 Technical Report" (2025), section 2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fairlead.layers.decoder import AttentionOptions
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.llama import LlamaForCausalLM
from fairlead.models.qwen2 import qwen_windows


class Qwen3ForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    }

    def attention(self, index: int) -> SelfAttention:
        attention = super().attention(index)
        attention.q_norm, attention.k_norm = self.norm(self.shape.head_size), self.norm(self.shape.head_size)
        return attention

    def attention_options(self, index: int) -> AttentionOptions:
        window = qwen_windows(self.config, self.shape.num_layers)[index]
        return replace(super().attention_options(index), sliding_window=window)
