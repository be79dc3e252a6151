"""Llama 1 to 3.x, and all that share its architecture (SmolLM, TinyLlama, Yi, …).

Source: Touvron et al., "LLaMA" (2023), section 2.2; "Llama 2" (2023), section 2.2 (grouped-query attention).
Shapes: T packed tokens, S sequences, H query heads, K kv-heads, D head size, E model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.errors import UnsupportedModelError
from fairlead.interface import AttentionSpec
from fairlead.layers.attention import Attention
from fairlead.layers.context import BuildContext, Step
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.linear import Linear, MergedLinear
from fairlead.layers.norm import RMSNorm
from fairlead.layers.rotary import Rotary, rope_params
from fairlead.models.config import ModelShape, positive_int, positive_number


class LlamaAttention(torch.nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary, ctx: BuildContext) -> None:
        super().__init__()
        H, K, D, E = shape.num_heads, shape.num_kv_heads, shape.head_size, shape.hidden_size
        bias = bool(config.get("attention_bias", False))
        self.head_size = D
        self.qkv_proj = MergedLinear(E, (("q_proj", H * D), ("k_proj", K * D), ("v_proj", K * D)), ctx, bias=bias)
        self.o_proj = Linear(H * D, E, ctx, bias=bias)
        self.rotary = rotary
        self.attention = Attention(AttentionSpec(num_heads=H, num_kv_heads=K, head_size=D, scale=D**-0.5))

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        q, k, v = self.qkv_proj(x_TE).split(self.qkv_proj.sizes, dim=-1)
        q_THD, k_TKD, v_TKD = (t.unflatten(-1, (-1, self.head_size)) for t in (q, k, v))
        q_THD, k_TKD = self.rotary(q_THD, k_TKD, positions_T)
        out: torch.Tensor = self.o_proj(self.attention(q_THD, k_TKD, v_TKD, step).flatten(1))
        return out


class LlamaMLP(torch.nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModelError(f"hidden_act {config['hidden_act']!r} is not supported here; supported: silu")
        F = positive_int(config, "intermediate_size")
        bias = bool(config.get("mlp_bias", False))
        self._activation = ctx.ops.silu_and_mul
        self.gate_up_proj = MergedLinear(shape.hidden_size, (("gate_proj", F), ("up_proj", F)), ctx, bias=bias)
        self.down_proj = Linear(F, shape.hidden_size, ctx, bias=bias)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self._activation(self.gate_up_proj(x_TE)))
        return out


class LlamaLayer(torch.nn.Module):
    """One decoder layer; the residual stream travels beside the normed one, so that add and norm can be one op."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary, ctx: BuildContext) -> None:
        super().__init__()
        eps = positive_number(config, "rms_norm_eps", 1e-6)
        self.input_layernorm = RMSNorm(shape.hidden_size, eps, ctx)
        self.self_attn = LlamaAttention(config, shape, rotary, ctx)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, eps, ctx)
        self.mlp = LlamaMLP(config, shape, ctx)

    def forward(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, positions_T: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual_TE is None:
            normed_TE, residual_TE = self.input_layernorm(x_TE), x_TE
        else:
            normed_TE, residual_TE = self.input_layernorm.add(x_TE, residual_TE)
        attended_TE = self.self_attn(normed_TE, positions_T, step)
        normed_TE, residual_TE = self.post_attention_layernorm.add(attended_TE, residual_TE)
        return self.mlp(normed_TE), residual_TE


class LlamaModel(torch.nn.Module):
    """Embedding, layers, final norm: token ids (T,) to hidden states (T, E)."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        rotary = Rotary(shape.head_size, rope_params(config), ctx)
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size, ctx)
        self.layers = torch.nn.ModuleList(LlamaLayer(config, shape, rotary, ctx) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, positive_number(config, "rms_norm_eps", 1e-6), ctx)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE: torch.Tensor = self.embed_tokens(token_ids_T)
        residual_TE: torch.Tensor | None = None
        for layer in self.layers:
            x_TE, residual_TE = layer(x_TE, residual_TE, positions_T, step)
        assert residual_TE is not None
        return self.norm.add(x_TE, residual_TE)[0]


class LlamaForCausalLM(torch.nn.Module):
    """The whole model; parameter names are the checkpoint's."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.model = LlamaModel(config, shape, ctx)
        tied = self.model.embed_tokens if config.get("tie_word_embeddings", False) else None
        self.lm_head = OutputHead(shape.vocab_size, shape.hidden_size, ctx, tied_to=tied)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Hidden states (T, E) of the step's tokens; writes their keys and values to the cache."""
        hidden_TE: torch.Tensor = self.model(token_ids_T, positions_T, step)
        return hidden_TE

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Logits (S, V) in float32 of chosen hidden states."""
        logits_SV: torch.Tensor = self.lm_head(hidden_SE)
        return logits_SV
