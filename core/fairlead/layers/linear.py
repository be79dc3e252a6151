"""Linear layers, single and merged."""

from collections.abc import Iterator

import torch

from fairlead.layers.context import BuildContext


class Linear(torch.nn.Module):
    """x (N, in) to (N, out)."""

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext, *, bias: bool = False) -> None:
        super().__init__()
        self._linear = ctx.ops.linear
        self.weight = ctx.weight(out_features, in_features)
        self.bias = ctx.weight(out_features) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, self.weight, self.bias)


class Conv1D(Linear):
    """A linear layer whose checkpoint stores the weight as (in, out): the pointwise convolution of GPT-2's code."""

    def __init__(self, in_features: int, out_features: int, ctx: BuildContext) -> None:
        super().__init__(in_features, out_features, ctx, bias=True)
        self.weight = ctx.weight(in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, self.weight.t(), self.bias)


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
