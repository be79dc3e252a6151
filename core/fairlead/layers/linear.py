"""Linear layers, single and merged."""

from collections.abc import Iterator

import torch

from fairlead.layers.context import BuildContext


class Linear(torch.nn.Module):
    """x (N, in) to (N, out), by the method that was chosen for the layer.

    The loader fills `weight` (out, in) and `bias`, then calls `pack_weights`; a weight that the method does not keep as
    it is is None from then on.
    `is_quantized` says whether the engine's scheme counts here. `tied_to` is the layer whose weight this one shares.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ctx: BuildContext,
        *,
        bias: bool = False,
        is_quantized: bool = True,
        tied_to: torch.nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.shape = ctx.linear_shape(in_features, out_features, is_shared=tied_to is not None)
        self.method = ctx.linear_method(self.shape, is_quantized=is_quantized)
        self._table, self._apply_method = ctx.linear, ctx.linear.apply_of(self.method, self.shape)
        self._activation: str | None = None
        self._adds = False
        self._packed: object = None
        self.weight: torch.nn.Parameter | None = ctx.weight(out_features, in_features) if tied_to is None else tied_to
        self.bias = ctx.weight(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._apply_method(x, self._packed, self.bias)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Two tensors whose sum is this layer's result plus the residual; None is left where the method has added it.

        A residual that is left may be added in the pass of a norm, so what cannot be fused here is not lost there.
        """
        if not self._adds:
            return self(x), residual
        return self._apply_method(x, self._packed, self.bias, residual), None

    def give_activation(self, activation: str) -> bool:
        """Leaves what follows to the layer's method, if it can do it; whether it does. Before the weight is packed."""
        if not self._table.fuses(self.method, self.shape, activation):
            return False
        self._activation = activation
        self._apply_method = self._table.apply_of(self.method, self.shape, activation)
        return True

    def give_residual(self) -> None:
        """Leaves the sum in `add` to the layer's method, if it can do it."""
        if self._table.fuses(self.method, self.shape, None):
            self._adds = True
            self._apply_method = self._table.apply_of(self.method, self.shape, self._activation, adds=True)

    def pack_weights(self) -> None:
        """Hands the loaded weight over to the method."""
        assert self.weight is not None
        weight = self._as_rows(self.weight.data)
        self._packed = self._table.pack(self.method, weight, self._activation)
        if self._packed is not weight:
            self.weight = None

    def packed_bytes(self) -> int:
        """Device memory of the packed weight."""
        return self.method.packed_bytes(self.shape)

    def dequantised(self) -> torch.Tensor:
        """The weight (out, in) of a loaded layer; not to be written to."""
        return self.method.dequantise(self._packed)

    def _as_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored weight as (out, in)."""
        return weight


def total(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """What `Linear.add` left undone."""
    return x if residual is None else residual + x


class PlainWeight(torch.nn.Module):
    """The weight (out, in) of a linear layer that its model takes apart instead of applying it: it is never packed."""

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext) -> None:
        super().__init__()
        self.weight = ctx.weight(out_features, in_features)


class Conv1D(Linear):
    """A linear layer whose checkpoint stores the weight as (in, out): the pointwise convolution of GPT-2's code."""

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext) -> None:
        super().__init__(in_features, out_features, ctx, bias=True)
        self.weight = ctx.weight(in_features, out_features)

    def _as_rows(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t()


class MergedLinear(Linear):
    """Several linear layers of one input, computed as one: their outputs stand side by side.

    `parts` are (name, output size). A checkpoint stores part `name` as a sibling of this layer, so
    "self_attn.qkv_proj" is read from "self_attn.q_proj", "self_attn.k_proj" and "self_attn.v_proj"; or it stores the
    whole under this layer's own name.
    """

    def __init__(
        self, in_features: int, parts: tuple[tuple[str, int], ...], ctx: BuildContext, *, bias: bool = False
    ) -> None:
        super().__init__(in_features, sum(size for _, size in parts), ctx, bias=bias)
        self.parts = parts
        self.sizes = [size for _, size in parts]

    def pieces(self, path: str, name: str) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
        """(stored name, index) of each piece of parameter `name`, if this layer stands at `path`."""
        parent, start = path.rpartition(".")[0], 0
        for part, size in self.parts:
            yield f"{parent}.{part}.{name}", (slice(start, start + size),)
            start += size
