"""The gated feed-forward layer."""

import torch

from fairlead.errors import UnsupportedModelError
from fairlead.layers.context import BuildContext
from fairlead.layers.linear import Linear, MergedLinear

_GATES = {
    "silu": "silu_and_mul",
    "swish": "silu_and_mul",
    "gelu_pytorch_tanh": "gelu_and_mul",
    "gelu_new": "gelu_and_mul",
}


class GatedMLP(torch.nn.Module):
    """down(activation(gate(x)) * up(x)). Source: Shazeer, "GLU Variants Improve Transformer" (2020), section 2.

    E model width, F feed-forward width. `activation` is a name of config.json's hidden_act.
    """

    def __init__(self, E: int, F: int, activation: str, ctx: BuildContext, *, bias: bool = False) -> None:
        super().__init__()
        if activation not in _GATES:
            raise UnsupportedModelError(
                f"hidden_act {activation!r} is not supported here; supported: {', '.join(_GATES)}"
            )
        self._activation = ctx.ops.silu_and_mul if _GATES[activation] == "silu_and_mul" else ctx.ops.gelu_and_mul
        self.gate_up_proj = MergedLinear(E, (("gate_proj", F), ("up_proj", F)), ctx, bias=bias)
        self.down_proj = Linear(F, E, ctx, bias=bias)

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        out_TE: torch.Tensor = self.down_proj(self._activation(self.gate_up_proj(x_TE)))
        return out_TE
