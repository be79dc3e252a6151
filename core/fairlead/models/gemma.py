"""Gemma 1: Llama with GELU, scaled embeddings, heads of a size of their own, and norm weights stored less one.

Source: Gemma Team, "Gemma" (2024), section 2.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from fairlead.layers.decoder import Mlp
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import gated_mlp
from fairlead.layers.norm import GemmaRMSNorm, Norm
from fairlead.models.config import optional_positive_number, positive_int, positive_number, refuse
from fairlead.models.llama import LlamaForCausalLM


class GemmaForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }

    def embedding(self) -> Embedding:
        E = self.shape.hidden_size
        return Embedding(self.shape.vocab_size, E, self.ctx, scale=E**0.5)

    def output_head(self, embedding: Embedding) -> OutputHead:
        refuse(self.config, "use_bidirectional_attention", False)
        tied_to = embedding if self.config["tie_word_embeddings"] else None
        soft_cap = optional_positive_number(self.config, "final_logit_softcapping")
        return OutputHead(self.shape.vocab_size, self.shape.hidden_size, self.ctx, tied_to=tied_to, soft_cap=soft_cap)

    def norm(self, size: int) -> Norm:
        return GemmaRMSNorm(size, positive_number(self.config, "rms_norm_eps", 1e-6), self.ctx)

    def mlp(self, index: int) -> Mlp:
        activation = self.config.get("hidden_activation") or self.config.get("hidden_act", "gelu_pytorch_tanh")
        if activation == "gelu":  # the first checkpoints say so, and mean the tanh form
            activation = "gelu_pytorch_tanh"
        return gated_mlp(self.shape.hidden_size, positive_int(self.config, "intermediate_size"), activation, self.ctx)
