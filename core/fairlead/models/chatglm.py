"""ChatGLM2, ChatGLM3 and GLM-4-chat, from the config.json that their first releases ship.

Source: Team GLM, "ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4" (2024), section 2: groups of heads
share keys, and rotary positions turn neighbouring dimensions of the first half of each head.
Shapes: T packed tokens, S sequences, H query heads, K kv-heads, D head size, E model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.layers.context import BuildContext, Step
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import FeedForward, gate
from fairlead.layers.linear import Linear, total
from fairlead.layers.norm import LayerNorm, RMSNorm
from fairlead.layers.rotary import Rotary
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import ModelShape, positive_int, positive_number, refuse, renamed


def _norm(config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> torch.nn.Module:
    kind = RMSNorm if config.get("rmsnorm", True) else LayerNorm
    return kind(shape.hidden_size, positive_number(config, "layernorm_epsilon", 1e-5), ctx)


class ChatGLMLayer(torch.nn.Module):
    """Attention and gated feed-forward, each behind a norm and beside the residual stream."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary, ctx: BuildContext) -> None:
        super().__init__()
        H, K, D, E = shape.num_heads, shape.num_kv_heads, shape.head_size, shape.hidden_size
        F, bias = positive_int(config, "ffn_hidden_size"), bool(config.get("add_bias_linear", False))
        qkv_bias = bias or bool(config.get("add_qkv_bias", False))
        self.input_layernorm = _norm(config, shape, ctx)
        self.self_attention = SelfAttention(
            shape,
            qkv=("query_key_value", Linear(E, (H + 2 * K) * D, ctx, bias=qkv_bias)),
            out=("dense", Linear(H * D, E, ctx, bias=bias)),
            rotary=rotary,
        )
        self.post_attention_layernorm = _norm(config, shape, ctx)
        gate_up, down = Linear(E, 2 * F, ctx, bias=bias), Linear(F, E, ctx, bias=bias)
        self.mlp = FeedForward(("dense_h_to_4h", gate_up), gate("silu_and_mul", ctx), ("dense_4h_to_h", down))

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = total(*self.self_attention.add(self.input_layernorm(x_TE), x_TE, positions_T, step))
        return total(*self.mlp.add(self.post_attention_layernorm(x_TE), x_TE))


class ChatGLMEncoder(torch.nn.Module):
    """Layers and the norm behind them."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        params = {
            "rope_type": "default",
            "rope_theta": 10000.0 * positive_number(config, "rope_ratio", 1.0),
            "partial_rotary_factor": 0.5,
        }
        rotary = Rotary(shape.head_size, params, ctx, interleaved=True)
        self.layers = torch.nn.ModuleList(ChatGLMLayer(config, shape, rotary, ctx) for _ in range(shape.num_layers))
        self.final_layernorm = _norm(config, shape, ctx) if config.get("post_layer_norm", True) else None

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        for layer in self.layers:
            x_TE = layer(x_TE, positions_T, step)
        return x_TE if self.final_layernorm is None else self.final_layernorm(x_TE)


class ChatGLMEmbedding(torch.nn.Module):
    """The level that checkpoints call "embedding"."""

    def __init__(self, shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.word_embeddings = Embedding(shape.vocab_size, shape.hidden_size, ctx)


class ChatGLMTransformer(torch.nn.Module):
    """Embedding, layers and output head stand together in the checkpoint."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.embedding = ChatGLMEmbedding(shape, ctx)
        self.encoder = ChatGLMEncoder(config, shape, ctx)
        tied = self.embedding.word_embeddings if config.get("tie_word_embeddings", False) else None
        self.output_layer = OutputHead(shape.vocab_size, shape.hidden_size, ctx, tied_to=tied)


class ChatGLMForConditionalGeneration(torch.nn.Module):
    """The whole model; parameter names are the checkpoint's. It is a plain decoder, whatever its name says."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        refuse(config, "apply_residual_connection_post_layernorm", False)
        refuse(config, "original_rope", True)
        refuse(config, "pre_seq_len")  # a prompt-tuning prefix
        refuse(config, "prefix_projection", False)
        refuse(config, "quantization_bit", 0)
        self.transformer = ChatGLMTransformer(config, shape, ctx)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """The usual names of the sizes; kv-heads are as many as heads unless multi_query_attention says otherwise."""
        usual = renamed(
            config,
            num_layers="num_hidden_layers",
            padded_vocab_size="vocab_size",
            kv_channels="head_dim",
            seq_length="max_position_embeddings",
            multi_query_group_num="num_key_value_heads",
        )
        if not config.get("multi_query_attention", False):
            usual["num_key_value_heads"] = config.get("num_attention_heads")
        return {**usual, "vocab_size": config.get("padded_vocab_size") or config.get("vocab_size")}

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Hidden states (T, E) of the step's tokens; writes their keys and values to the cache."""
        x_TE = self.transformer.embedding.word_embeddings(token_ids_T)
        hidden_TE: torch.Tensor = self.transformer.encoder(x_TE, positions_T, step)
        return hidden_TE

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Logits (S, V) in float32 of chosen hidden states."""
        logits_SV: torch.Tensor = self.transformer.output_layer(hidden_SE)
        return logits_SV
