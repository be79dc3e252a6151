"""What a model is built with, and what one step brings to it."""

from dataclasses import dataclass

import torch

from fairlead.interface import AttentionBackend, KVCache
from fairlead.ops.table import Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Handed down through a model's constructors. Weights are made on the meta device; the loader gives them memory."""

    ops: Ops
    dtype: torch.dtype
    device: torch.device
    max_model_len: int

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
        """A weight without memory yet, of the model's dtype unless another is given."""
        return torch.nn.Parameter(torch.empty(shape, dtype=dtype or self.dtype, device="meta"), requires_grad=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepGroup:
    """One group of attention layers in one step."""

    backend: AttentionBackend
    kv_caches: list[KVCache]
    plan: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What the attention layers need of one step, by group: an argument of every forward, never a global."""

    groups: tuple[StepGroup, ...]
