"""What most decoders since Llama are made of: their self-attention, and ways to place norms and residuals around it.

Every layer takes and returns the pair (x, residual) whose sum is the residual stream, so that an add and the norm
behind it can be one op; the residual is None in the first layer, and where a projection has added it already.
Shapes: T packed tokens, H query heads, K kv-heads, D head size, E model width.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from fairlead.layers.context import BuildContext, Step
from fairlead.layers.embedding import Embedding
from fairlead.layers.linear import Linear, MergedLinear, total
from fairlead.layers.norm import Norm
from fairlead.layers.rotary import Rotary
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionOptions:
    """In what one layer's self-attention differs from another's.

    Without a `rotary` it has no positions. `scale` multiplies the scores. q, k and v are clamped to ± `clip`.
    `sliding_window` and `soft_cap` are those of AttentionSpec.
    """

    rotary: Rotary | None
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    clip: float | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None


def grouped_attention(shape: ModelShape, options: AttentionOptions, ctx: BuildContext) -> SelfAttention:
    """Self-attention under the names of Llama's checkpoints."""
    H, K, D, E = shape.num_heads, shape.num_kv_heads, shape.head_size, shape.hidden_size
    parts = (("q_proj", H * D), ("k_proj", K * D), ("v_proj", K * D))
    return SelfAttention(
        shape,
        qkv=("qkv_proj", MergedLinear(E, parts, ctx, bias=options.qkv_bias)),
        out=("o_proj", Linear(H * D, E, ctx, bias=options.output_bias)),
        rotary=options.rotary,
        scale=options.scale,
        clip=options.clip,
        sliding_window=options.sliding_window,
        soft_cap=options.soft_cap,
    )


class Mixer(Protocol):
    """Attention of a layer, whose projection may add the residual stream."""

    def __call__(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """What the layer adds to the stream."""
        ...

    def add(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, positions_T: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Two tensors whose sum is that plus the residual; see `Linear.add`."""
        ...


class Mlp(Protocol):
    """Feed-forward of a layer, whose projection may add the residual stream."""

    def __call__(self, x_TE: torch.Tensor) -> torch.Tensor:
        """What the layer adds to the stream."""
        ...

    def add(self, x_TE: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Two tensors whose sum is that plus the residual; see `Linear.add`."""
        ...


class PreNormLayer(torch.nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, attention: Mixer, mlp: Mlp, norms: tuple[Norm, Norm]) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = norms

    def forward(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, positions_T: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        normed_TE, stream_TE = _add_norm(self.input_layernorm, x_TE, residual_TE)
        attended_TE, residual_TE = self.self_attn.add(normed_TE, stream_TE, positions_T, step)
        normed_TE, stream_TE = _add_norm(self.post_attention_layernorm, attended_TE, residual_TE)
        return self.mlp.add(normed_TE, stream_TE)


class ParallelLayer(torch.nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)). Source: Wang and Komatsuzaki, GPT-J (2021)."""

    def __init__(self, attention: Mixer, mlp: Mlp, norm: Norm) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm = norm

    def forward(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, positions_T: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed_TE, residual_TE = _add_norm(self.input_layernorm, x_TE, residual_TE)
        return total(*self.mlp.add(normed_TE, self.self_attn(normed_TE, positions_T, step))), residual_TE


class SandwichLayer(torch.nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))). Source: Gemma 2 (2024), section 2."""

    def __init__(self, attention: Mixer, mlp: Mlp, norms: tuple[Norm, Norm, Norm, Norm]) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = norms[:2]
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norms[2:]

    def forward(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, positions_T: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed_TE, residual_TE = _add_norm(self.input_layernorm, x_TE, residual_TE)
        attended_TE = self.post_attention_layernorm(self.self_attn(normed_TE, positions_T, step))
        normed_TE, residual_TE = self.pre_feedforward_layernorm.add(attended_TE, residual_TE)
        return self.post_feedforward_layernorm(self.mlp(normed_TE)), residual_TE


class PostNormLayer(torch.nn.Module):
    """x + norm(attention(x)), then x + norm(mlp(x)). Source: OLMo 2 (2024), section 3.2."""

    def __init__(self, attention: Mixer, mlp: Mlp, norms: tuple[Norm, Norm]) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, mlp
        self.post_attention_layernorm, self.post_feedforward_layernorm = norms

    def forward(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor | None, positions_T: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual_TE is not None:
            x_TE = x_TE + residual_TE
        x_TE = x_TE + self.post_attention_layernorm(self.self_attn(x_TE, positions_T, step))
        return self.post_feedforward_layernorm(self.mlp(x_TE)), x_TE


def _add_norm(norm: Norm, x_TE: torch.Tensor, residual_TE: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return (norm(x_TE), x_TE) if residual_TE is None else norm.add(x_TE, residual_TE)


class Decoder(torch.nn.Module):
    """Embedding, layers, final norm: token ids (T,) to hidden states (T, E)."""

    def __init__(self, embedding: Embedding, layers: Iterable[torch.nn.Module], norm: Norm) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = torch.nn.ModuleList(layers)
        self.norm = norm

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        x_TE: torch.Tensor = self.embed_tokens(token_ids_T)
        residual_TE: torch.Tensor | None = None
        for layer in self.layers:
            x_TE, residual_TE = layer(x_TE, residual_TE, positions_T, step)
        return _add_norm(self.norm, x_TE, residual_TE)[0]


class HeadedModel(torch.nn.Module):
    """A decoder and its output head, which stand under the checkpoint's names for them: `body` and `head`."""

    body: ClassVar[str] = "model"
    head: ClassVar[str] = "lm_head"

    def forward(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Hidden states (T, E) of the step's tokens; writes their keys and values to the cache."""
        hidden_TE: torch.Tensor = self.get_submodule(self.body)(token_ids_T, positions_T, step)
        return hidden_TE

    def logits(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        """Logits (S, V) in float32 of chosen hidden states."""
        logits_SV: torch.Tensor = self.get_submodule(self.head)(hidden_SE)
        return logits_SV
