"""Mixture of experts: a router and the experts that it chooses from.

Shapes: T packed tokens, E model width, F width of an expert, X experts.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional

from fairlead.interface import MoeSpec
from fairlead.layers.context import BuildContext


class Router(torch.nn.Module):
    """x (T, E) to a logit for each expert (T, X), computed in float32 where `in_float32`.

    With `has_correction` it holds the bias that balances the choice of experts.
    """

    def __init__(
        self, E: int, X: int, ctx: BuildContext, *, in_float32: bool = False, has_correction: bool = False
    ) -> None:
        super().__init__()
        self._linear, self._in_float32 = ctx.ops.linear, in_float32
        self.weight = ctx.weight(X, E)
        self.e_score_correction_bias = ctx.weight(X, dtype=torch.float32) if has_correction else None

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        if self._in_float32:  # not the op, whose provider was chosen for the model's dtype
            return functional.linear(x_TE.float(), self.weight.float())
        return self._linear(x_TE, self.weight, None)


class Experts(torch.nn.Module):
    """The weights of all experts, stacked. `names` are those of gate, up and down in a checkpoint."""

    def __init__(self, E: int, F: int, X: int, ctx: BuildContext, *, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.gate_up_proj = ctx.weight(X, 2 * F, E)
        self.down_proj = ctx.weight(X, E, F)
        self._names, self._size = names, F

    def pieces(self, path: str, name: str) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
        """A checkpoint stores each expert by itself."""
        gate, up, down = self._names
        for expert in range(len(self.down_proj)):
            if name == "down_proj":
                yield f"{path}.{expert}.{down}.weight", (expert,)
            else:
                yield f"{path}.{expert}.{gate}.weight", (expert, slice(self._size))
                yield f"{path}.{expert}.{up}.weight", (expert, slice(self._size, None))


class MoE(torch.nn.Module):
    """Routed experts and, where `shared` is set, a dense MLP that every token goes through beside them.

    `shared` and its gate (a sigmoid of one logit for each token) are set by a family that has them.
    """

    def __init__(
        self,
        E: int,
        F: int,
        spec: MoeSpec,
        ctx: BuildContext,
        *,
        router: Router | None = None,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> None:
        super().__init__()
        self._moe, self.spec = ctx.ops.moe, spec
        self.gate = router or Router(E, spec.num_experts, ctx)
        self.experts = Experts(E, F, spec.num_experts, ctx, names=names)
        self.shared: torch.nn.Module | None = None
        self.shared_gate: torch.nn.Module | None = None

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        out_TE = self._moe(
            x_TE,
            self.gate(x_TE),
            self.gate.e_score_correction_bias,
            self.experts.gate_up_proj,
            self.experts.down_proj,
            self.spec,
        )
        if self.shared is None:
            return out_TE
        shared_TE: torch.Tensor = self.shared(x_TE)
        if self.shared_gate is not None:
            shared_TE = shared_TE * self.shared_gate(x_TE).sigmoid()
        return out_TE + shared_TE
