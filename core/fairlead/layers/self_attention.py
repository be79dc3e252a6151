"""Self-attention between one projection to queries, keys and values and one back.

Shapes: T packed tokens, H query heads, K kv-heads, D head size, E model width.
"""

from collections.abc import Callable

import torch

from fairlead.interface import AttentionSpec
from fairlead.layers.attention import Attention
from fairlead.layers.context import Step
from fairlead.layers.linear import Linear
from fairlead.layers.rotary import Rotary
from fairlead.models.config import ModelShape

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Layout = Callable[[torch.Tensor, ModelShape], QKV]
"""How q (T, H, D), k and v (T, K, D) lie in what the projection gives, (T, (H + 2K) * D)."""


def side_by_side(qkv: torch.Tensor, shape: ModelShape) -> QKV:
    """All queries, then all keys, then all values."""
    H, K, D = shape.num_heads, shape.num_kv_heads, shape.head_size
    q, k, v = torch.split_with_sizes(qkv.view(-1, H + 2 * K, D), [H, K, K], dim=1)
    return q, k, v


def by_kv_head(qkv: torch.Tensor, shape: ModelShape) -> QKV:
    """For each kv-head the queries that share it, its key and its value, as GPT-NeoX and Falcon store them."""
    qkv = qkv.view(qkv.shape[0], shape.num_kv_heads, -1, shape.head_size)
    return qkv[:, :, :-2].flatten(1, 2), qkv[:, :, -2], qkv[:, :, -1]


class SelfAttention(torch.nn.Module):
    """Causal self-attention with rotary positions, ALiBi or neither.

    `qkv` and `out` are (name in the checkpoint, layer).
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        qkv: tuple[str, Linear],
        out: tuple[str, Linear],
        layout: Layout,
        rotary: Rotary | None = None,
        alibi_slopes: tuple[float, ...] | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self._shape, self._layout = shape, layout
        self._projections = qkv[1], out[1]
        self.add_module(*qkv)
        self.add_module(*out)
        self.rotary = rotary
        self.attention = Attention(
            AttentionSpec(
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_size=shape.head_size,
                scale=shape.head_size**-0.5 if scale is None else scale,
                alibi_slopes=alibi_slopes,
            )
        )

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        qkv, out = self._projections
        q_THD, k_TKD, v_TKD = self._layout(qkv(x_TE), self._shape)
        if self.rotary is not None:
            q_THD, k_TKD = self.rotary(q_THD, k_TKD, positions_T)
        out_THD = self.attention(q_THD.contiguous(), k_TKD, v_TKD, step)
        out_TE: torch.Tensor = out(out_THD.flatten(1))
        return out_TE
