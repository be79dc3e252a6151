"""Feed-forward blocks: two linear layers with a nonlinearity between, gated or not.

Shapes: T packed tokens, E model width, F feed-forward width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from fairlead.errors import UnsupportedModelError
from fairlead.layers.context import BuildContext
from fairlead.layers.linear import Linear, MergedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """`name` is one of `fairlead.interface.ACTIVATIONS`; `fn` does it where no linear method has done so."""

    name: str
    fn: Callable[[torch.Tensor], torch.Tensor]


_TANH_GELU = Activation(name="gelu_tanh", fn=partial(functional.gelu, approximate="tanh"))
ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(name="relu", fn=functional.relu),
    "silu": Activation(name="silu", fn=functional.silu),
    "gelu": Activation(name="gelu", fn=functional.gelu),
    "gelu_new": _TANH_GELU,
    "gelu_fast": _TANH_GELU,
    "gelu_pytorch_tanh": _TANH_GELU,
}
"""By the names that configs use."""


_GATES = {
    "silu": "silu_and_mul",
    "swish": "silu_and_mul",
    "gelu_pytorch_tanh": "gelu_and_mul",
    "gelu_new": "gelu_and_mul",
}
"""The ops of gated blocks, by the names that configs use."""


def gate(op: str, ctx: BuildContext) -> Activation:
    """One of `fairlead.interface.GATED_ACTIVATIONS`."""
    return Activation(name=op, fn=getattr(ctx.ops, op))


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
        self._activation = None if enter[1].give_activation(act.name) else act.fn
        leave[1].give_residual()
        self._projections = enter[1], leave[1]
        self.add_module(*enter)
        self.add_module(*leave)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        out_TE: torch.Tensor = self._projections[1](self._enter(x_TE))
        return out_TE

    def add(self, x_TE: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Two tensors whose sum is the result plus the residual; see `Linear.add`."""
        return self._projections[1].add(self._enter(x_TE), residual_TE)

    def _enter(self, x_TE: torch.Tensor) -> torch.Tensor:
        x_TF: torch.Tensor = self._projections[0](x_TE)
        return x_TF if self._activation is None else self._activation(x_TF)


def gated_mlp(E: int, F: int, act: str, ctx: BuildContext, *, bias: bool = False) -> FeedForward:
    """down(activation(gate(x)) * up(x)). Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.

    E model width, F feed-forward width. `act` is a name of config.json's hidden_act.
    """
    if act not in _GATES:
        raise UnsupportedModelError(f"hidden_act {act!r} is not supported here; supported: {', '.join(_GATES)}")
    gate_up = MergedLinear(E, (("gate_proj", F), ("up_proj", F)), ctx, bias=bias)
    return FeedForward(("gate_up_proj", gate_up), gate(_GATES[act], ctx), ("down_proj", Linear(F, E, ctx, bias=bias)))
