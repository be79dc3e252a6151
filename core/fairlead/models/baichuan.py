"""Baichuan and Baichuan 2: 7B with rotary positions, 13B with ALiBi.

Source: Yang et al., "Baichuan 2: Open Large-scale Language Models" (2023), section 2.
Shapes: T packed tokens, S sequences, V vocabulary, E model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.layers.alibi import alibi_slopes
from fairlead.layers.context import BuildContext, Step
from fairlead.layers.decoder import HeadedModel
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import gated_mlp
from fairlead.layers.linear import Linear, total
from fairlead.layers.norm import RMSNorm
from fairlead.layers.rotary import Rotary, rope_params
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import ModelShape, positive_int, refuse

_BAICHUAN_2_VOCAB = 125_696


class BaichuanLayer(torch.nn.Module):
    """Attention and gated feed-forward, each behind a norm and beside the residual stream."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary | None, ctx: BuildContext) -> None:
        super().__init__()
        E, F, eps = shape.hidden_size, positive_int(config, "intermediate_size"), float(config["rms_norm_eps"])
        self.input_layernorm = RMSNorm(E, eps, ctx)
        self.self_attn = SelfAttention(
            shape,
            qkv=("W_pack", Linear(E, 3 * E, ctx)),
            out=("o_proj", Linear(E, E, ctx)),
            rotary=rotary,
            alibi_slopes=alibi_slopes(shape.num_heads) if rotary is None else None,
        )
        self.post_attention_layernorm = RMSNorm(E, eps, ctx)
        self.mlp = gated_mlp(E, F, "silu", ctx)

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = total(*self.self_attn.add(self.input_layernorm(x_TE), x_TE, positions_T, step))
        return total(*self.mlp.add(self.post_attention_layernorm(x_TE), x_TE))


class BaichuanModel(torch.nn.Module):
    """Embedding, layers, final norm. Only the rotary models name max_position_embeddings."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        rotary = Rotary(shape.head_size, rope_params(config), ctx) if config["has_rotary_positions"] else None
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size, ctx)
        self.layers = torch.nn.ModuleList(BaichuanLayer(config, shape, rotary, ctx) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, float(config["rms_norm_eps"]), ctx)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = self.embed_tokens(token_ids_T)
        for layer in self.layers:
            x_TE = layer(x_TE, positions_T, step)
        out_TE: torch.Tensor = self.norm(x_TE)
        return out_TE


class NormHead(OutputHead):
    """An output head whose rows count with length 1 (Baichuan 2, section 2.5)."""

    _lengths_V: torch.Tensor | None = None

    def forward(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        if self._lengths_V is None:
            self._lengths_V = self.dequantised().float().norm(dim=1)
        return super().forward(hidden_SE) / self._lengths_V


class BaichuanForCausalLM(HeadedModel):
    """The whole model; parameter names are the checkpoint's."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        refuse(config, "hidden_act", "silu")
        refuse(config, "tie_word_embeddings", False)
        refuse(config, "num_key_value_heads", shape.num_heads)
        self.model = BaichuanModel(config, shape, ctx)
        is_second = "z_loss_weight" in config or shape.vocab_size == _BAICHUAN_2_VOCAB
        head = NormHead if is_second else OutputHead
        self.lm_head = head(shape.vocab_size, shape.hidden_size, ctx)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """The 13B models name model_max_length alone; that is what tells them from the rotary ones."""
        return {
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": config.get("model_max_length"),
            "has_rotary_positions": "max_position_embeddings" in config,
            **config,
        }
