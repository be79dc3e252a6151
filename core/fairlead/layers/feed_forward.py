"""Feed-forward blocks: two linear layers with a nonlinearity between, gated or not."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from fairlead.errors import UnsupportedModelError
from fairlead.layers.context import BuildContext
from fairlead.layers.linear import Linear, MergedLinear

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


def gated_mlp(E: int, F: int, act: str, ctx: BuildContext, *, bias: bool = False) -> FeedForward:
    """down(activation(gate(x)) * up(x)). Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.

    E model width, F feed-forward width. `act` is a name of config.json's hidden_act.
    """
    ops = {
        "silu": ctx.ops.silu_and_mul,
        "swish": ctx.ops.silu_and_mul,
        "gelu_pytorch_tanh": ctx.ops.gelu_and_mul,
        "gelu_new": ctx.ops.gelu_and_mul,
    }
    if act not in ops:
        raise UnsupportedModelError(f"hidden_act {act!r} is not supported here; supported: {', '.join(ops)}")
    gate_up = MergedLinear(E, (("gate_proj", F), ("up_proj", F)), ctx, bias=bias)
    return FeedForward(("gate_up_proj", gate_up), ops[act], ("down_proj", Linear(F, E, ctx, bias=bias)))
