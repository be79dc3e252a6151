"""Linear layers: how a scheme stores their weights, and multiplies by them.

Shapes: N rows, I input features, O output features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

UNQUANTIZED = "unquantized"
"""The scheme of weights that stay in the model's dtype; a platform may still lay them out as its kernels like."""

GATED_ACTIVATIONS = ("silu_and_mul", "gelu_and_mul")
"""Those that multiply one half of a row by the other and halve its width: ops of the same names say how."""

ACTIVATIONS = (*GATED_ACTIVATIONS, "relu", "silu", "gelu", "gelu_tanh")
"""What may follow a linear layer. "gelu" is the exact form, "gelu_tanh" that of a tanh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """One linear layer. `dtype` is that of its rows and results ("bfloat16"), before packing that of its weight too.

    `is_shared`: the plain weight stays in memory whatever `pack` does, since the embedding reads it as well.
    """

    in_features: int
    out_features: int
    dtype: str
    is_shared: bool = False


class LinearMethod(Protocol):
    """One way to serve one scheme; the platform offers its own in `Platform.linear_methods`, the core has a reference.

    The choice is made per layer when a model is built: the first of the platform's methods that does not refuse, else
    the reference. `name` selects it on the command line (`--op-providers linear=NAME`).
    """

    name: str

    def refuses(self, shape: LinearShape) -> str | None:
        """Why this method cannot serve a layer of this shape, or None if it can."""
        ...

    def packed_bytes(self, shape: LinearShape) -> int:
        """Device memory that the layer takes once packed; 0 if it keeps nothing but a weight that `is_shared`."""
        ...

    def pack(self, tensors: "Mapping[str, torch.Tensor]") -> object:
        """Turns the loaded tensors of one layer into what `apply` wants; called once per layer, while loading.

        `tensors["weight"]` is (O, I), on the device, in the model's dtype; it may be a transposed view. The schemes
        "int8", "int4" and "fp8" quantise it here. Fused layers (queries, keys and values; gate and up) come as one. The
        method may keep the tensors; if it does not, their memory is free once it returns, so a model that is packed
        takes no more than itself and one layer. What it allocates comes from the platform's allocator under the tag
        "weights".
        """
        ...

    def apply(self, x_NI: "torch.Tensor", packed: object, bias_O: "torch.Tensor | None") -> "torch.Tensor":
        """x times the weight transposed, plus bias: a new (N, O) tensor in x's dtype. Changes no argument.

        x may be a strided view and N may be 0. Tolerance against `x @ dequantise(packed).T + bias` in float32:
        `fairlead.ops.linear.TOLERANCE` by scheme and dtype.
        """
        ...

    def dequantise(self, packed: object) -> "torch.Tensor":
        """The weight that `packed` stands for, (O, I), in float32 or the model's dtype; slow, for checks and rare uses.

        It may share memory with `packed`: the caller does not write to it.
        """
        ...


@runtime_checkable
class FusedLinearMethod(Protocol):
    """What a LinearMethod may do beside: an activation, and the sum with a residual, in the pass that multiplies.

    The core looks for it once per layer, when the model is built, and only where nobody asked for a provider of the op
    that it would replace by name: a gated activation's own, `fused_add_rms_norm` for the sum.
    """

    def refuses_fused(self, shape: LinearShape, activation: str | None) -> str | None:
        """Why it cannot serve a layer with this one of ACTIVATIONS (None: with a residual alone), or None if it can.

        `shape` is that of the weight: behind a gated activation, half of `out_features` come out.
        """
        ...

    def pack_fused(self, tensors: "Mapping[str, torch.Tensor]", activation: str) -> object:
        """What `pack` does, for a layer with an activation; of a gated one the gate's rows come first, then as many of
        the up projection. It takes no more than `packed_bytes`, and `dequantise` gives the rows in the same order.
        """
        ...

    def apply_fused(
        self,
        x_NI: "torch.Tensor",
        packed: object,
        bias_O: "torch.Tensor | None",
        residual_NO: "torch.Tensor | None" = None,
    ) -> "torch.Tensor":
        """activation(what `apply` gives) + residual: a new tensor in x's dtype. Changes no argument.

        `packed` comes from `pack_fused` or, for no activation, from `pack`. What lies between need not be rounded to
        x's dtype. The residual has the result's shape, and may be a strided view. Tolerance: that of `apply`.
        """
        ...
