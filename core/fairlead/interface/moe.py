"""Mixture of experts: how tokens find their experts."""

from dataclasses import dataclass


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
