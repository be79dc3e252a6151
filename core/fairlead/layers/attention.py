"""The attention layer: hands q, k and v to the platform's backend."""

import torch

from fairlead.layers.context import Step


class Attention(torch.nn.Module):
    """Causal attention over layer `layer`'s paged cache. (T, H, D), (T, K, D), (T, K, D) give (T, H, D)."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, step: Step) -> torch.Tensor:
        return step.backend.forward(q_THD, k_TKD, v_TKD, step.kv_caches[self.layer], step.plan)
