"""Feed-forward blocks: two linear layers with a nonlinearity between, gated or not."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from fairlead.errors import UnsupportedModelError
from fairlead.layers.context import BuildContext
from fairlead.layers.linear import Linear

Activation = Callable[[torch.Tensor], torch.Tensor]

_TANH_GELU = partial(functional.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Activation] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
}
"""By the names that configs use."""


def activation(config: Mapping[str, Any], key: str, default: str) -> Activation:
    """The activation that config[key] names; raises UnsupportedModelError for another."""
    name = config.get(key) or default
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"config.json: {key} {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


class FeedForward(torch.nn.Module):
    """out(activation(in(x))); `enter` and `leave` are (name in the checkpoint, layer)."""

    def __init__(self, enter: tuple[str, Linear], act: Activation, leave: tuple[str, Linear]) -> None:
        super().__init__()
        self._activation = act
        self._projections = enter[1], leave[1]
        self.add_module(*enter)
        self.add_module(*leave)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        enter, leave = self._projections
        out_TE: torch.Tensor = leave(self._activation(enter(x_TE)))
        return out_TE


def swiglu(gate_up: tuple[str, Linear], down: tuple[str, Linear], ctx: BuildContext) -> FeedForward:
    """silu(gate) * up between, gate and up being the two halves of one layer's output."""
    return FeedForward(gate_up, ctx.ops.silu_and_mul, down)
