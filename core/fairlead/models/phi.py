"""Phi-1, Phi-1.5 and Phi-2.

Source: Li et al., "Textbooks Are All You Need II: phi-1.5" (2023), section 2.1: rotary positions on half of each head,
and attention and feed-forward side by side behind one norm.
Shapes: T packed tokens, S sequences, E model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.layers.context import BuildContext, Step
from fairlead.layers.decoder import HeadedModel
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import FeedForward, activation
from fairlead.layers.linear import Linear, MergedLinear, total
from fairlead.layers.norm import LayerNorm
from fairlead.layers.rotary import Rotary, rope_params
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import ModelShape, positive_int, positive_number, refuse


class PhiLayer(torch.nn.Module):
    """Attention and feed-forward of the same normed input, added to the residual stream together."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary, ctx: BuildContext) -> None:
        super().__init__()
        H, K, D, E = shape.num_heads, shape.num_kv_heads, shape.head_size, shape.hidden_size
        F = positive_int(config, "intermediate_size", 4 * E)
        parts = (("q_proj", H * D), ("k_proj", K * D), ("v_proj", K * D))
        self.input_layernorm = LayerNorm(E, positive_number(config, "layer_norm_eps", 1e-5), ctx)
        self.self_attn = SelfAttention(
            shape,
            qkv=("qkv_proj", MergedLinear(E, parts, ctx, bias=True)),
            out=("dense", Linear(H * D, E, ctx, bias=True)),
            rotary=rotary,
        )
        act = activation(config, "hidden_act", "gelu_new")
        enter, leave = Linear(E, F, ctx, bias=True), Linear(F, E, ctx, bias=True)
        self.mlp = FeedForward(("fc1", enter), act, ("fc2", leave))

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        normed_TE = self.input_layernorm(x_TE)
        attended_TE = total(*self.self_attn.add(normed_TE, x_TE, positions_T, step))
        return total(*self.mlp.add(normed_TE, attended_TE))


class PhiModel(torch.nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        rotary = Rotary(shape.head_size, rope_params({"partial_rotary_factor": 0.5, **config}), ctx)
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size, ctx)
        self.layers = torch.nn.ModuleList(PhiLayer(config, shape, rotary, ctx) for _ in range(shape.num_layers))
        self.final_layernorm = LayerNorm(shape.hidden_size, positive_number(config, "layer_norm_eps", 1e-5), ctx)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            x_TE = layer(x_TE, positions_T, step)
        out_TE: torch.Tensor = self.final_layernorm(x_TE)
        return out_TE


class PhiForCausalLM(HeadedModel):
    """The whole model; parameter names are the checkpoint's."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        refuse(config, "qk_layernorm", False)
        self.model = PhiModel(config, shape, ctx)
        tied = self.model.embed_tokens if config.get("tie_word_embeddings", False) else None
        self.lm_head = OutputHead(shape.vocab_size, shape.hidden_size, ctx, tied_to=tied, bias=True)
