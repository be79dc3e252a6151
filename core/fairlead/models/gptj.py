"""GPT-J.

Source: Wang and Komatsuzaki, "GPT-J-6B" (2021), mesh-transformer-jax: rotary positions on neighbouring dimensions of a
part of each head, and attention and feed-forward side by side behind one norm.
Shapes: T packed tokens, S sequences, E model width, F feed-forward width.
"""

from collections.abc import Mapping
from typing import Any

import torch

from fairlead.errors import CheckpointError
from fairlead.layers.context import BuildContext, Step
from fairlead.layers.decoder import HeadedModel
from fairlead.layers.embedding import Embedding, OutputHead
from fairlead.layers.feed_forward import FeedForward, activation
from fairlead.layers.linear import Linear, MergedLinear, total
from fairlead.layers.norm import LayerNorm
from fairlead.layers.rotary import Rotary
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import ModelShape, positive_int, positive_number, renamed


class GPTJLayer(torch.nn.Module):
    """Attention and feed-forward of the same normed input, added to the residual stream together."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary, ctx: BuildContext) -> None:
        super().__init__()
        E, F = shape.hidden_size, positive_int(config, "intermediate_size", 4 * shape.hidden_size)
        self.ln_1 = LayerNorm(E, positive_number(config, "layer_norm_epsilon", 1e-5), ctx)
        self.attn = SelfAttention(
            shape,
            qkv=("qkv_proj", MergedLinear(E, (("q_proj", E), ("k_proj", E), ("v_proj", E)), ctx)),
            out=("out_proj", Linear(E, E, ctx)),
            rotary=rotary,
        )
        act = activation(config, "activation_function", "gelu_new")
        enter, leave = Linear(E, F, ctx, bias=True), Linear(F, E, ctx, bias=True)
        self.mlp = FeedForward(("fc_in", enter), act, ("fc_out", leave))

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        normed_TE = self.ln_1(x_TE)
        attended_TE = total(*self.attn.add(normed_TE, x_TE, positions_T, step))
        return total(*self.mlp.add(normed_TE, attended_TE))


class GPTJModel(torch.nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        rotary_size = positive_int(config, "rotary_dim")
        if rotary_size > shape.head_size:
            raise CheckpointError(f"config.json: rotary_dim {rotary_size} exceeds the head size {shape.head_size}")
        params = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": rotary_size / shape.head_size,
        }
        rotary = Rotary(shape.head_size, params, ctx, interleaved=True)
        self.wte = Embedding(shape.vocab_size, shape.hidden_size, ctx)
        self.h = torch.nn.ModuleList(GPTJLayer(config, shape, rotary, ctx) for _ in range(shape.num_layers))
        self.ln_f = LayerNorm(shape.hidden_size, positive_number(config, "layer_norm_epsilon", 1e-5), ctx)

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE = self.wte(token_ids_T)
        for layer in self.h:
            x_TE = layer(x_TE, positions_T, step)
        out_TE: torch.Tensor = self.ln_f(x_TE)
        return out_TE


class GPTJForCausalLM(HeadedModel):
    """The whole model; parameter names are the checkpoint's."""

    body = "transformer"

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> None:
        super().__init__()
        self.transformer = GPTJModel(config, shape, ctx)
        tied = self.transformer.wte if config.get("tie_word_embeddings", False) else None
        self.lm_head = OutputHead(shape.vocab_size, shape.hidden_size, ctx, tied_to=tied, bias=True)

    @staticmethod
    def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
        """The usual names of what GPT-J's config calls n_embd, n_head, …; rotary_dim is 64 where it is left out."""
        usual = renamed(
            config,
            n_embd="hidden_size",
            n_head="num_attention_heads",
            n_layer="num_hidden_layers",
            n_inner="intermediate_size",
            n_positions="max_position_embeddings",
        )
        return {"rotary_dim": 64, **usual}
