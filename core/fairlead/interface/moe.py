"""Mixture of experts: how tokens find their experts, and who multiplies.

Shapes: T packed tokens, E model width, F width of an expert, X experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from fairlead.interface.linear import LinearShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The routing of one layer.

    Scores are the `scoring` ("softmax" or "sigmoid") of the router's logits. Of `num_groups` equal groups of experts
    the `top_groups` best stay, by the sum of their `group_top` best experts; of those the `top_k` best are taken.
    Their scores weigh their outputs, divided by their sum if `normalize`, and times `scale`.
    Sources: Fedus et al., "Switch Transformers" (2021), section 2.1; DeepSeek-V2 (2024), section 2.2.2; DeepSeek-V3
    (2024), section 2.1.2.
    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_top: int = 1

    def __post_init__(self) -> None:
        assert self.scoring in ("softmax", "sigmoid")
        assert self.num_experts % self.num_groups == 0
        group_size = self.num_experts // self.num_groups
        assert 1 <= self.group_top <= group_size
        assert 1 <= self.top_groups <= self.num_groups
        assert 1 <= self.top_k <= self.top_groups * group_size


@runtime_checkable
class ExpertsMethod(Protocol):
    """What a LinearMethod may do beside: the experts of a mixture, all in one call.

    The core looks for it once per layer, when the model is built, where the method was chosen for both of an expert's
    layers, the platform has no provider of the op `moe` for them, and nobody asked for one by name.
    """

    def refuses_experts(self, enter: LinearShape, leave: LinearShape, spec: MoeSpec) -> str | None:
        """Why it cannot serve experts of these two layers each (gate and up, down), or None if it can."""
        ...

    def pack_experts(self, tensors: "Mapping[str, torch.Tensor]", spec: MoeSpec) -> object:
        """What `pack` does, for `tensors["gate_up"]` (X, 2F, E), the gate's rows first, and `tensors["down"]`
        (X, E, F). It takes no more than `packed_bytes` of the two shapes, X times.
        """
        ...

    def apply_experts(
        self, x_TE: "torch.Tensor", logits_TX: "torch.Tensor", correction_X: "torch.Tensor | None", packed: object
    ) -> "torch.Tensor":
        """What the reference `moe` gives with these weights: a new (T, E) tensor in x's dtype. Changes no argument.

        x may be a strided view; logits are in x's dtype or float32, the correction is in float32. Tolerance against
        the method's own `apply` on each expert's rows: `fairlead.ops.linear.TOLERANCE`.
        """
        ...
