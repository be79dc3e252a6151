"""Falcon: 7B (one kv-head, one norm), 40B and 180B (groups of heads, two norms), and RefinedWeb-1B (ALiBi).

Source: Almazrouei et al., "The Falcon Series of Open Language Models" (2023), section 4.
Shapes: T packed tokens, S sequences, H query heads, K kv-heads, D head size, E model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.errors import UnsupportedModelError
from fairlead.layers.alibi import alibi_slopes
from fairlead.layers.context import BuildContext, Step
from fairlead.layers.decoder import HeadedModel
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import FeedForward, activation
from fairlead.layers.linear import Linear, total
from fairlead.layers.norm import LayerNorm
from fairlead.layers.rotary import Rotary, rope_params
from fairlead.layers.self_attention import SelfAttention, by_kv_head
from fairlead.models.config import ModelShape, positive_int, positive_number, renamed


def falcon_slopes(shape: ModelShape) -> tuple[float, ...]:
    """ALiBi slopes as Falcon uses them: rounded to bfloat16, and scaled together with the scores.

    Its reference code also rounds slope * position, which from position 257 on moves keys; we keep exact distances.
    """
    slopes = torch.tensor(alibi_slopes(shape.num_heads)).bfloat16().float() * shape.head_size**-0.5
    return tuple(slopes.tolist())


class FalconLayer(torch.nn.Module):
    """Attention and feed-forward: side by side behind one norm or two, or one after the other."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary | None, ctx: BuildContext) -> None:
        super().__init__()
        H, K, D, E = shape.num_heads, shape.num_kv_heads, shape.head_size, shape.hidden_size
        F, bias = positive_int(config, "ffn_hidden_size", 4 * E), bool(config.get("bias", False))
        eps = positive_number(config, "layer_norm_epsilon", 1e-5)
        self._norms = _norms(config)
        for name in self._norms:
            self.add_module(name, LayerNorm(E, eps, ctx))
        self._is_parallel = _is_parallel(config)
        self.self_attention = SelfAttention(
            shape,
            qkv=("query_key_value", Linear(E, (H + 2 * K) * D, ctx, bias=bias)),
            out=("dense", Linear(E, E, ctx, bias=bias)),
            layout=by_kv_head,
            rotary=rotary,
            alibi_slopes=falcon_slopes(shape) if rotary is None else None,
        )
        self.mlp = FeedForward(
            ("dense_h_to_4h", Linear(E, F, ctx, bias=bias)),
            activation(config, "activation", "gelu"),
            ("dense_4h_to_h", Linear(F, E, ctx, bias=bias)),
        )

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        first, last = self.get_submodule(self._norms[0]), self.get_submodule(self._norms[-1])
        normed_TE = first(x_TE)
        attended_TE = total(*self.self_attention.add(normed_TE, x_TE, positions_T, step))
        if first is not last:
            normed_TE = last(x_TE if self._is_parallel else attended_TE)
        return total(*self.mlp.add(normed_TE, attended_TE))


def _is_parallel(config: Mapping[str, Any]) -> bool:
    return bool(config.get("new_decoder_architecture", False) or config.get("parallel_attn", True))


def _norms(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The layer's norms, that of attention first; one serves both where there is one."""
    if not _is_parallel(config):
        return ("input_layernorm", "post_attention_layernorm")
    if not config.get("new_decoder_architecture", False):
        return ("input_layernorm",)
    return ("input_layernorm",) if config.get("num_ln_in_parallel_attn") == 1 else ("ln_attn", "ln_mlp")


class FalconModel(torch.nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        rotary = None if config.get("alibi", False) else Rotary(shape.head_size, rope_params(config), ctx)
        self.word_embeddings = Embedding(shape.vocab_size, shape.hidden_size, ctx)
        self.h = torch.nn.ModuleList(FalconLayer(config, shape, rotary, ctx) for _ in range(shape.num_layers))
        self.ln_f = LayerNorm(shape.hidden_size, positive_number(config, "layer_norm_epsilon", 1e-5), ctx)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = self.word_embeddings(token_ids_T)
        for layer in self.h:
            x_TE = layer(x_TE, positions_T, step)
        out_TE: torch.Tensor = self.ln_f(x_TE)
        return out_TE


class FalconForCausalLM(HeadedModel):
    """The whole model; parameter names are the checkpoint's."""

    body = "transformer"

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        if shape.hidden_size != shape.num_heads * shape.head_size:
            raise UnsupportedModelError(
                f"config.json: head_dim must be hidden_size / num_attention_heads, got {shape.head_size}"
            )
        self.transformer = FalconModel(config, shape, ctx)
        tied = self.transformer.word_embeddings if config.get("tie_word_embeddings", True) else None
        self.lm_head = OutputHead(shape.vocab_size, shape.hidden_size, ctx, tied_to=tied)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """The usual names, those of the first RefinedWeb configs included; the layout says how many kv-heads."""
        usual = renamed(
            config,
            n_embed="hidden_size",
            n_head="num_attention_heads",
            n_layer="num_hidden_layers",
            n_head_kv="num_key_value_heads",
            num_kv_heads="num_key_value_heads",
        )
        if not usual.get("new_decoder_architecture", False):
            multi_query = usual.get("multi_query", True)
            usual["num_key_value_heads"] = 1 if multi_query else usual.get("num_attention_heads")
        return usual
