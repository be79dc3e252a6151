"""OLMo 1 and 2.

OLMo 1 is Llama with layer norms that have no parameters, and with q, k and v clamped. OLMo 2 norms what comes out of
attention and MLP rather than what goes in, and q and k over their whole width.
Sources: Groeneveld et al., "OLMo" (2024), section 2.1; "2 OLMo 2 Furious" (2025), section 3.2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fairlead.layers.decoder import AttentionOptions, PostNormLayer
from fairlead.layers.norm import LayerNorm, Norm
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import optional_positive_number
from fairlead.models.llama import LlamaForCausalLM


class OlmoForCausalLM(LlamaForCausalLM):
    def norm(self, size: int) -> Norm:
        return LayerNorm(size, 1e-5, self.ctx, elementwise_affine=False)

    def attention_options(self, index: int) -> AttentionOptions:
        return replace(super().attention_options(index), clip=optional_positive_number(self.config, "clip_qkv"))


class Olmo2ForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {"rms_norm_eps": 1e-5}

    def layer(self, index: int) -> torch.nn.Module:
        E = self.shape.hidden_size
        return PostNormLayer(self.attention(index), self.mlp(index), (self.norm(E), self.norm(E)))

    def attention(self, index: int) -> SelfAttention:
        attention = super().attention(index)
        attention.q_norm = self.norm(self.shape.num_heads * self.shape.head_size)
        attention.k_norm = self.norm(self.shape.num_kv_heads * self.shape.head_size)
        return attention
