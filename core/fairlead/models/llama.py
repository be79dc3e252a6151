"""Llama 1 to 3.x, and all that share its architecture (SmolLM, TinyLlama, Yi, …).

Sources: Touvron et al., "LLaMA" (2023), section 2.2; "Llama 2" (2023), section 2.2 (grouped-query attention).
Shapes: T packed tokens, S sequences, E model width, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fairlead.layers.context import BuildContext
from fairlead.layers.decoder import AttentionOptions, Decoder, HeadedModel, Mlp, PreNormLayer, grouped_attention
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import gated_mlp
from fairlead.layers.norm import Norm, RMSNorm
from fairlead.layers.rotary import Rotary, rope_params
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import ModelShape, positive_int, positive_number


class LlamaForCausalLM(HeadedModel):
    """The whole model; parameter names are the checkpoint's.

    A family that differs from Llama overrides the methods that make the differing parts. `defaults` stand for what a
    config.json leaves out. `checkpoint_names` turns parts of our parameter names into the checkpoint's.
    `unused_weights` are prefixes of stored tensors that inference does not need.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    checkpoint_names: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.config, self.shape, self.ctx = config, shape, ctx
        self._rotaries: dict[str, Rotary] = {}
        layers = [self.layer(i) for i in range(shape.num_layers)]
        self.model = Decoder(self.embedding(), layers, self.norm(shape.hidden_size))
        self.lm_head = self.output_head(self.model.embed_tokens)

    @classmethod
    def read_config(cls, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config, with the family's defaults for what it leaves out."""
        return {**cls.defaults, **config}

    @property
    def unused_weights(self) -> tuple[str, ...]:
        return ()

    def embedding(self) -> Embedding:
        return Embedding(self.shape.vocab_size, self.shape.hidden_size, self.ctx)

    def output_head(self, embedding: Embedding) -> OutputHead:
        tied_to = embedding if self.config.get("tie_word_embeddings", False) else None
        return OutputHead(self.shape.vocab_size, self.shape.hidden_size, self.ctx, tied_to=tied_to)

    def norm(self, size: int) -> Norm:
        return RMSNorm(size, positive_number(self.config, "rms_norm_eps", 1e-6), self.ctx)

    def layer(self, index: int) -> torch.nn.Module:
        E = self.shape.hidden_size
        return PreNormLayer(self.attention(index), self.mlp(index), (self.norm(E), self.norm(E)))

    def attention(self, index: int) -> SelfAttention:
        return grouped_attention(self.shape, self.attention_options(index), self.ctx)

    def attention_options(self, index: int) -> AttentionOptions:
        bias = bool(self.config.get("attention_bias", False))
        return AttentionOptions(
            rotary=self.rotary(rope_params(self.config)),
            scale=self.shape.head_size**-0.5,
            qkv_bias=bias,
            output_bias=bias,
        )

    def mlp(self, index: int) -> Mlp:
        F = positive_int(self.config, "intermediate_size")
        activation = self.config.get("hidden_act", "silu")
        bias = bool(self.config.get("mlp_bias", False))
        return gated_mlp(self.shape.hidden_size, F, activation, self.ctx, bias=bias)

    def rotary(self, params: Mapping[str, Any], head_size: int | None = None) -> Rotary:
        """The table of these settings: layers of equal ones share it."""
        key = repr(sorted(params.items()))
        if key not in self._rotaries:
            self._rotaries[key] = Rotary(head_size or self.shape.head_size, params, self.ctx)
        return self._rotaries[key]
