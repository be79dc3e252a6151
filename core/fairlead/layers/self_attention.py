"""Self-attention between one projection to queries, keys and values and one back.

Shapes: T packed tokens, H query heads, K kv-heads, D head size, E model width.
"""

from collections.abc import Callable

import torch

from fairlead.interface import AttentionBackend, AttentionSpec, RotaryAttention
from fairlead.layers.attention import Attention
from fairlead.layers.context import Step
from fairlead.layers.linear import Linear
from fairlead.layers.norm import Norm
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
    """Causal self-attention with rotary positions, ALiBi or neither; optionally q and k are normed first.

    `qkv` and `out` are (name in the checkpoint, layer). q, k and v are clamped to ± `clip`. The others are those of
    AttentionSpec. `q_norm` and `k_norm` are set by a family that has them: over each head, or over the whole
    projection, by their size. Sources: Ainslie et al., "GQA" (2023), section 2.2; Dehghani et al., "Scaling Vision
    Transformers to 22 Billion Parameters" (2023), section 2 (norms of q and k).
    """

    def __init__(
        self,
        shape: ModelShape,
        *,
        qkv: tuple[str, Linear],
        out: tuple[str, Linear],
        layout: Layout = side_by_side,
        rotary: Rotary | None = None,
        scale: float | None = None,
        clip: float | None = None,
        sliding_window: int | None = None,
        soft_cap: float | None = None,
        alibi_slopes: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self._shape, self._layout, self._clip = shape, layout, clip
        self._projections = qkv[1], out[1]
        out[1].give_residual()
        self.add_module(*qkv)
        self.add_module(*out)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        self.rotary = rotary
        self._is_rotary_in_backend = False
        self.attention = Attention(
            AttentionSpec(
                num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads,
                head_size=shape.head_size,
                scale=shape.head_size**-0.5 if scale is None else scale,
                sliding_window=sliding_window,
                soft_cap=soft_cap,
                alibi_slopes=alibi_slopes,
            )
        )

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        out_TE: torch.Tensor = self._projections[1](self._attend(x_TE, positions_T, step))
        return out_TE

    def add(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, positions_T: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Two tensors whose sum is the result plus the residual; see `Linear.add`."""
        return self._projections[1].add(self._attend(x_TE, positions_T, step), residual_TE)

    def _attend(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """What the heads give, side by side."""
        qkv = self._projections[0](x_TE)
        if self._clip is not None:
            qkv = qkv.clamp(-self._clip, self._clip)
        q_THD, k_TKD, v_TKD = self._layout(qkv, self._shape)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = _norm_parts(self.q_norm, q_THD), _norm_parts(self.k_norm, k_TKD)
        if self._is_rotary_in_backend:
            assert self.rotary is not None
            out_THD = self.attention.forward_rotary(q_THD, k_TKD, v_TKD, positions_T, self.rotary, step)
        else:
            if self.rotary is not None:
                q_THD, k_TKD = self.rotary(q_THD, k_TKD, positions_T)
            out_THD = self.attention(q_THD.contiguous(), k_TKD, v_TKD, step)
        return out_THD.flatten(1)

    def give_rotary(self, backend: AttentionBackend) -> bool:
        """Leaves the rotation of q and k to the layer's backend, if it can; whether it does. For the builder."""
        self._is_rotary_in_backend = self.rotary is not None and isinstance(backend, RotaryAttention)
        return self._is_rotary_in_backend


def _norm_parts(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    """Norms each run of `norm.size` entries of a row."""
    return norm(x.reshape(-1, norm.size)).view(x.shape)
