"""GPT-NeoX, Pythia, and all that share their architecture.

Source: Black et al., "GPT-NeoX-20B" (2022), section 2.1: rotary positions on a part of each head, and attention and
feed-forward side by side.
Shapes: T packed tokens, S sequences, E model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.layers.context import BuildContext, Step
from fairlead.layers.decoder import HeadedModel
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import FeedForward, activation
from fairlead.layers.linear import Linear, total
from fairlead.layers.norm import LayerNorm
from fairlead.layers.rotary import Rotary, rope_params
from fairlead.layers.self_attention import SelfAttention, by_kv_head
from fairlead.models.config import ModelShape, positive_int, positive_number, renamed


class GPTNeoXLayer(torch.nn.Module):
    """Attention and feed-forward, each behind a norm of its own: side by side, or one after the other."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary, ctx: BuildContext) -> None:
        super().__init__()
        E, F = shape.hidden_size, positive_int(config, "intermediate_size")
        eps, bias = positive_number(config, "layer_norm_eps", 1e-5), bool(config.get("attention_bias", True))
        self._is_parallel = bool(config.get("use_parallel_residual", True))
        self.input_layernorm = LayerNorm(E, eps, ctx)
        self.post_attention_layernorm = LayerNorm(E, eps, ctx)
        self.attention = SelfAttention(
            shape,
            qkv=("query_key_value", Linear(E, 3 * E, ctx, bias=bias)),
            out=("dense", Linear(E, E, ctx, bias=bias)),
            layout=by_kv_head,
            rotary=rotary,
        )
        self.mlp = FeedForward(
            ("dense_h_to_4h", Linear(E, F, ctx, bias=True)),
            activation(config, "hidden_act", "gelu"),
            ("dense_4h_to_h", Linear(F, E, ctx, bias=True)),
        )

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        attended_TE = total(*self.attention.add(self.input_layernorm(x_TE), x_TE, positions_T, step))
        seen_TE = x_TE if self._is_parallel else attended_TE
        return total(*self.mlp.add(self.post_attention_layernorm(seen_TE), attended_TE))


class GPTNeoXModel(torch.nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        rotary = Rotary(shape.head_size, rope_params(config), ctx)
        self.embed_in = Embedding(shape.vocab_size, shape.hidden_size, ctx)
        self.layers = torch.nn.ModuleList(GPTNeoXLayer(config, shape, rotary, ctx) for _ in range(shape.num_layers))
        self.final_layer_norm = LayerNorm(shape.hidden_size, positive_number(config, "layer_norm_eps", 1e-5), ctx)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = self.embed_in(token_ids_T)
        for layer in self.layers:
            x_TE = layer(x_TE, positions_T, step)
        out_TE: torch.Tensor = self.final_layer_norm(x_TE)
        return out_TE


class GPTNeoXForCausalLM(HeadedModel):
    """The whole model; parameter names are the checkpoint's."""

    body = "gpt_neox"
    head = "embed_out"

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.gpt_neox = GPTNeoXModel(config, shape, ctx)
        tied = self.gpt_neox.embed_in if config.get("tie_word_embeddings", False) else None
        self.embed_out = OutputHead(shape.vocab_size, shape.hidden_size, ctx, tied_to=tied)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """The usual names of rotary_pct and rotary_emb_base, whose defaults are this family's own."""
        usual = renamed(config, rotary_pct="partial_rotary_factor", rotary_emb_base="rope_theta")
        return {"partial_rotary_factor": 0.25, **usual}
