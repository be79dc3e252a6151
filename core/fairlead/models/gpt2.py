"""GPT-2.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
Shapes: T packed tokens, S sequences, E model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.layers.context import BuildContext, Step
from fairlead.layers.decoder import HeadedModel
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import FeedForward, activation
from fairlead.layers.linear import Conv1D, total
from fairlead.layers.norm import LayerNorm
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import ModelShape, positive_int, positive_number, refuse, renamed


class GPT2Layer(torch.nn.Module):
    """Attention and feed-forward, each behind a norm and beside the residual stream."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, layer: int, ctx: BuildContext) -> None:
        super().__init__()
        E, F = shape.hidden_size, positive_int(config, "intermediate_size", 4 * shape.hidden_size)
        eps = positive_number(config, "layer_norm_epsilon", 1e-5)
        scale = shape.head_size**-0.5 if config.get("scale_attn_weights", True) else 1.0
        if config.get("scale_attn_by_inverse_layer_idx", False):
            scale /= layer + 1
        self.ln_1 = LayerNorm(E, eps, ctx)
        self.attn = SelfAttention(
            shape,
            qkv=("c_attn", Conv1D(E, 3 * E, ctx)),
            out=("c_proj", Conv1D(E, E, ctx)),
            scale=scale,
        )
        self.ln_2 = LayerNorm(E, eps, ctx)
        act = activation(config, "activation_function", "gelu_new")
        self.mlp = FeedForward(("c_fc", Conv1D(E, F, ctx)), act, ("c_proj", Conv1D(F, E, ctx)))

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = total(*self.attn.add(self.ln_1(x_TE), x_TE, positions_T, step))
        return total(*self.mlp.add(self.ln_2(x_TE), x_TE))


class GPT2Model(torch.nn.Module):
    """Token and position embeddings, layers, final norm."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.wte = Embedding(shape.vocab_size, shape.hidden_size, ctx)
        self.wpe = Embedding(shape.max_positions, shape.hidden_size, ctx)
        self.h = torch.nn.ModuleList(GPT2Layer(config, shape, i, ctx) for i in range(shape.num_layers))
        self.ln_f = LayerNorm(shape.hidden_size, positive_number(config, "layer_norm_epsilon", 1e-5), ctx)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = self.wte(token_ids_T) + self.wpe(positions_T)
        for layer in self.h:
            x_TE = layer(x_TE, positions_T, step)
        out_TE: torch.Tensor = self.ln_f(x_TE)
        return out_TE


class GPT2LMHeadModel(HeadedModel):
    """The whole model; parameter names are the checkpoint's."""

    body = "transformer"

    optional_prefix = "transformer."

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        refuse(config, "add_cross_attention", False)
        self.transformer = GPT2Model(config, shape, ctx)
        tied = self.transformer.wte if config.get("tie_word_embeddings", True) else None
        self.lm_head = OutputHead(shape.vocab_size, shape.hidden_size, ctx, tied_to=tied)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """The usual names of what GPT-2's config calls n_embd, n_head, …"""
        return renamed(
            config,
            n_embd="hidden_size",
            n_head="num_attention_heads",
            n_layer="num_hidden_layers",
            n_inner="intermediate_size",
            n_positions="max_position_embeddings",
        )
