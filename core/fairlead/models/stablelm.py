"""StableLM 3B and 2: Llama with layer norms and partial rotary; optionally parallel parts and a norm for each head.

Source: Bellagente et al., "Stable LM 2 1.6B Technical Report" (2024), section 2.2.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fairlead.layers.context import BuildContext
from fairlead.layers.decoder import AttentionOptions, ParallelLayer
from fairlead.layers.norm import LayerNorm, Norm
from fairlead.layers.self_attention import SelfAttention
from fairlead.models.config import positive_number, refuse
from fairlead.models.llama import LlamaForCausalLM


class StableLmForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 4096, "partial_rotary_factor": 0.25}
    checkpoint_names: ClassVar[Mapping[str, str]] = {".q_norm.": ".q_layernorm.", ".k_norm.": ".k_layernorm."}

    def norm(self, size: int) -> Norm:
        return LayerNorm(size, self._eps, self.ctx)

    def layer(self, index: int) -> torch.nn.Module:
        if not self.config.get("use_parallel_residual", False):
            return super().layer(index)
        return ParallelLayer(self.attention(index), self.mlp(index), self.norm(self.shape.hidden_size))

    def attention(self, index: int) -> SelfAttention:
        attention = super().attention(index)
        if self.config.get("qk_layernorm", False):
            D = self.shape.head_size
            attention.q_norm = HeadLayerNorm(self.shape.num_heads, D, self._eps, self.ctx)
            attention.k_norm = HeadLayerNorm(self.shape.num_kv_heads, D, self._eps, self.ctx)
        return attention

    def attention_options(self, index: int) -> AttentionOptions:
        refuse(self.config, "rope_pct", self.config["partial_rotary_factor"])
        bias = bool(self.config.get("use_qkv_bias", False))
        return replace(super().attention_options(index), qkv_bias=bias, output_bias=False)

    @property
    def _eps(self) -> float:
        return positive_number(self.config, "layer_norm_eps", 1e-5)


class HeadLayerNorm(torch.nn.Module):
    """A layer norm for each head, without bias: rows of H * D entries."""

    def __init__(self, H: int, D: int, eps: float, ctx: BuildContext) -> None:
        super().__init__()
        self._norm = LayerNorm(D, eps, ctx, elementwise_affine=False)
        self.weight = ctx.weight(H, D)
        self.size = H * D

    def forward(self, x_NE: torch.Tensor) -> torch.Tensor:
        H, D = self.weight.shape
        normed_NHD: torch.Tensor = self._norm(x_NE.reshape(-1, D)).view(-1, H, D)
        return (normed_NHD * self.weight).flatten(1)

    def add(self, x_NE: torch.Tensor, residual_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual)."""
        total_NE = x_NE + residual_NE
        return self(total_NE), total_NE

    def pieces(self, path: str, name: str) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
        """A checkpoint stores one tensor for each head."""
        return ((f"{path}.norms.{head}.{name}", (head,)) for head in range(self.weight.shape[0]))
