"""What a model is built with, and what one step brings to it."""

from dataclasses import dataclass

import torch

from fairlead.interface import UNQUANTIZED, AttentionBackend, KVCache, LinearMethod, LinearShape
from fairlead.ops.linear import LinearTable
from fairlead.ops.table import Ops, choose_ops


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildContext:
    """Handed down through a model's constructors. Weights are made on the meta device; the loader gives them memory.

    `quantization` is the scheme of linear layers, those apart that always stay as they are (heads, routers).
    """

    ops: Ops
    linear: LinearTable
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    quantization: str = UNQUANTIZED

    @classmethod
    def reference(
        cls, *, max_model_len: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "BuildContext":
        """Every op by its reference, on a device of torch's own; for tests and tools."""
        name = str(dtype).removeprefix("torch.")
        ops = choose_ops("none", {}, dtype=name)[0]
        linear = LinearTable("none", {}, ops.linear)
        return cls(ops=ops, linear=linear, dtype=dtype, device=torch.device(device), max_model_len=max_model_len)

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> torch.nn.Parameter:
        """A weight without memory yet, of the model's dtype unless another is given."""
        return torch.nn.Parameter(torch.empty(shape, dtype=dtype or self.dtype, device="meta"), requires_grad=False)

    def linear_method(self, shape: LinearShape, *, is_quantized: bool = True) -> LinearMethod:
        """What stores and multiplies the weight of a linear layer."""
        return self.linear.choose(self.quantization if is_quantized else UNQUANTIZED, shape)

    def linear_shape(self, in_features: int, out_features: int, *, is_shared: bool = False) -> LinearShape:
        """A layer of the model's dtype."""
        dtype = str(self.dtype).removeprefix("torch.")
        return LinearShape(in_features=in_features, out_features=out_features, dtype=dtype, is_shared=is_shared)


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
