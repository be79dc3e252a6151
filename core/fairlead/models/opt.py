"""OPT.

Source: Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022), section 2; its 350M model norms behind
the residual addition and has narrower embeddings.
Shapes: T packed tokens, S sequences, E model width, F feed-forward width, W embedding width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.layers.context import BuildContext, Step
from fairlead.layers.decoder import HeadedModel
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import activation
from fairlead.layers.linear import Linear, MergedLinear, total
from fairlead.layers.norm import LayerNorm
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import ModelShape, positive_int

_POSITION_OFFSET = 2  # rows 0 and 1 of the position table were for padding
_EPS = 1e-5


def _norm(config: Mapping[str, Any], size: int, ctx: BuildContext) -> LayerNorm:
    return LayerNorm(size, _EPS, ctx, elementwise_affine=bool(config.get("layer_norm_elementwise_affine", True)))


class OPTLayer(torch.nn.Module):
    """Attention and feed-forward; each norm stands before its block or behind the addition."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        E, F, bias = shape.hidden_size, positive_int(config, "ffn_dim"), bool(config.get("enable_bias", True))
        self._norm_before = bool(config.get("do_layer_norm_before", True))
        self.self_attn = SelfAttention(
            shape,
            qkv=("qkv_proj", MergedLinear(E, (("q_proj", E), ("k_proj", E), ("v_proj", E)), ctx, bias=bias)),
            out=("out_proj", Linear(E, E, ctx, bias=bias)),
        )
        self.self_attn_layer_norm = _norm(config, E, ctx)
        act = activation(config, "activation_function", "relu")
        # fc1 and fc2 stand in the layer itself, not in a module of their own.
        self.fc1, self.fc2 = Linear(E, F, ctx, bias=bias), Linear(F, E, ctx, bias=bias)
        self._activation = None if self.fc1.give_activation(act.name) else act.fn
        self.fc2.give_residual()
        self.final_layer_norm = _norm(config, E, ctx)

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        if self._norm_before:
            x_TE = total(*self.self_attn.add(self.self_attn_layer_norm(x_TE), x_TE, positions_T, step))
            return self._feed_forward(self.final_layer_norm(x_TE), x_TE)
        x_TE = self.self_attn_layer_norm(total(*self.self_attn.add(x_TE, x_TE, positions_T, step)))
        out_TE: torch.Tensor = self.final_layer_norm(self._feed_forward(x_TE, x_TE))
        return out_TE

    def _feed_forward(self, x_TE: torch.Tensor, residual_TE: torch.Tensor) -> torch.Tensor:
        x_TF = self.fc1(x_TE)
        if self._activation is not None:
            x_TF = self._activation(x_TF)
        return total(*self.fc2.add(x_TF, residual_TE))


class OPTDecoder(torch.nn.Module):
    """Embeddings, layers, and the norm and projection behind them where the config has them."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        E, W = shape.hidden_size, positive_int(config, "word_embed_proj_dim", shape.hidden_size)
        has_norm = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
        self.embed_tokens = Embedding(shape.vocab_size, W, ctx)
        self.embed_positions = Embedding(shape.max_positions + _POSITION_OFFSET, E, ctx)
        self.project_in = None if E == W else Linear(W, E, ctx)
        self.layers = torch.nn.ModuleList(OPTLayer(config, shape, ctx) for _ in range(shape.num_layers))
        self.final_layer_norm = _norm(config, E, ctx) if has_norm else None
        self.project_out = None if E == W else Linear(E, W, ctx)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x = self.embed_tokens(token_ids_T)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + self.embed_positions(positions_T + _POSITION_OFFSET)
        for layer in self.layers:
            x = layer(x, positions_T, step)
        for last in (self.final_layer_norm, self.project_out):
            if last is not None:
                x = last(x)
        out_TW: torch.Tensor = x
        return out_TW


class OPTModel(torch.nn.Module):
    """The level that checkpoints call "model"."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.decoder = OPTDecoder(config, shape, ctx)


class OPTForCausalLM(HeadedModel):
    """The whole model; parameter names are the checkpoint's."""

    body = "model.decoder"

    optional_prefix = "model."

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.model = OPTModel(config, shape, ctx)
        embedding = self.model.decoder.embed_tokens
        tied = embedding if config.get("tie_word_embeddings", True) else None
        self.lm_head = OutputHead(shape.vocab_size, embedding.weight.shape[1], ctx, tied_to=tied)
