"""The attention layer: hands q, k and v to the platform's backend."""

from typing import cast

import torch

from fairlead.interface import AttentionSpec, RotaryAttention
from fairlead.layers.context import Step
from fairlead.layers.rotary import Rotary


class Attention(torch.nn.Module):
    """Causal attention over this layer's paged cache. (T, H, D), (T, K, D), (T, K, D) give (T, H, D).

    Layers of one spec form a group with a backend and block tables of their own. The engine builder numbers the
    groups, and the layers in each, once the model stands: `group` and `layer` are set by it.
    """

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.group = self.layer = 0

    def forward(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, step: Step) -> torch.Tensor:
        group = step.groups[self.group]
        return group.backend.forward(q_THD, k_TKD, v_TKD, group.kv_caches[self.layer], group.plan)

    def forward_rotary(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        v_TKD: torch.Tensor,
        positions_T: torch.Tensor,
        rotary: Rotary,
        step: Step,
    ) -> torch.Tensor:
        """With q and k rotated by the backend, which must be a RotaryAttention."""
        group = step.groups[self.group]
        return cast(RotaryAttention, group.backend).forward_rotary(
            q_THD,
            k_TKD,
            v_TKD,
            positions_T,
            rotary.cos_PD,
            rotary.sin_PD,
            rotary.interleaved,
            group.kv_caches[self.layer],
            group.plan,
        )
