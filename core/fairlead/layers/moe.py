"""Mixture of experts: a router and the experts that it chooses from.

Shapes: T packed tokens, E model width, F width of an expert, X experts.
"""

from collections.abc import Iterator

import torch
from torch.nn import functional

from fairlead.interface import UNQUANTIZED, MoeSpec
from fairlead.layers.context import BuildContext
from fairlead.layers.feed_forward import FeedForward
from fairlead.layers.linear import Linear, total
from fairlead.ops import reference
from fairlead.ops.linear import PlainLinear


class Router(Linear):
    """x (T, E) to a logit for each expert (T, X), never quantised; computed in float32 where `in_float32`.

    With `has_correction` it holds the bias that balances the choice of experts.
    """

    def __init__(
        self, E: int, X: int, ctx: BuildContext, *, in_float32: bool = False, has_correction: bool = False
    ) -> None:
        super().__init__(E, X, ctx, is_quantized=False)
        self._in_float32 = in_float32
        self.e_score_correction_bias = ctx.weight(X, dtype=torch.float32) if has_correction else None

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        if not self._in_float32:
            return super().forward(x_TE)
        assert self.weight is not None
        return functional.linear(x_TE.float(), self.weight.float())  # methods are of the model's dtype

    def pack_weights(self) -> None:
        """As of any linear layer, but for one that is computed in float32."""
        if not self._in_float32:
            super().pack_weights()

    def packed_bytes(self) -> int:
        """Device memory of the weight."""
        if not self._in_float32:
            return super().packed_bytes()
        assert self.weight is not None
        return self.weight.nbytes


class Experts(torch.nn.Module):
    """The weights of all experts. `names` are those of gate, up and down in a checkpoint.

    They stay stacked for the op `moe` where they are in the model's dtype and the platform has nothing better: a
    provider of the op first, then a linear method of its own that runs all experts, then such methods to which the
    loaded weights go expert by expert.
    """

    def __init__(self, E: int, F: int, spec: MoeSpec, ctx: BuildContext, *, names: tuple[str, str, str]) -> None:
        super().__init__()
        X = spec.num_experts
        self.gate_up_proj = ctx.weight(X, 2 * F, E)
        self.down_proj = ctx.weight(X, E, F)
        self._names, self._size, self._spec = names, F, spec
        self._moe, self._activation = ctx.ops.moe, ctx.ops.silu_and_mul
        self._shapes = ctx.linear_shape(E, 2 * F), ctx.linear_shape(F, E)
        self._table = ctx.linear
        self._enter, self._leave = (ctx.linear_method(shape) for shape in self._shapes)
        self._apply_enter, self._apply_leave = (
            ctx.linear.apply_of(method, shape)
            for method, shape in zip((self._enter, self._leave), self._shapes, strict=True)
        )
        has_own_op = ctx.quantization == UNQUANTIZED and ctx.ops.moe is not reference.moe
        is_plain = isinstance(self._enter, PlainLinear) and isinstance(self._leave, PlainLinear)
        self._apply_experts = (
            ctx.linear.experts_of(self._enter, *self._shapes, spec)
            if self._enter is self._leave and not has_own_op
            else None
        )
        self._is_stacked = has_own_op or (is_plain and self._apply_experts is None)
        self._packed_experts: object = None
        self._packed: list[tuple[object, object]] = []

    def forward(self, x_TE: torch.Tensor, logits_TX: torch.Tensor, correction_X: torch.Tensor | None) -> torch.Tensor:
        if self._is_stacked:
            return self._moe(x_TE, logits_TX, correction_X, self.gate_up_proj, self.down_proj, self._spec)
        if self._apply_experts is not None:
            return self._apply_experts(x_TE, logits_TX, correction_X, self._packed_experts)
        return reference.moe_by_expert(x_TE, logits_TX, correction_X, self._spec, self._run_expert)

    def _run_expert(self, expert: int, rows_NE: torch.Tensor) -> torch.Tensor:
        enter, leave = self._packed[expert]
        return self._apply_leave(self._activation(self._apply_enter(rows_NE, enter, None)), leave, None)

    def pack_weights(self) -> None:
        """Hands the loaded weights over to what will multiply by them."""
        if self._is_stacked:
            return
        gate_up_X2FE, down_XEF = self.gate_up_proj.data, self.down_proj.data
        if self._apply_experts is not None:
            self._packed_experts = self._table.pack_experts(self._enter, gate_up_X2FE, down_XEF, self._spec)
            del self.gate_up_proj, self.down_proj
            return
        for enter, leave in zip(gate_up_X2FE, down_XEF, strict=True):
            self._packed.append((self._table.pack(self._enter, enter), self._table.pack(self._leave, leave)))
        del self.gate_up_proj, self.down_proj

    def packed_bytes(self) -> int:
        """Device memory of the weights once they are packed."""
        if self._is_stacked:
            return self.gate_up_proj.nbytes + self.down_proj.nbytes
        methods = zip((self._enter, self._leave), self._shapes, strict=True)
        return self._spec.num_experts * sum(method.packed_bytes(shape) for method, shape in methods)

    def pieces(self, path: str, name: str) -> Iterator[tuple[str, tuple[int | slice, ...]]]:
        """A checkpoint stores each expert by itself."""
        gate, up, down = self._names
        for expert in range(self._spec.num_experts):
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
        self.gate = router or Router(E, spec.num_experts, ctx)
        self.experts = Experts(E, F, spec, ctx, names=names)
        self.shared: FeedForward | None = None
        self.shared_gate: torch.nn.Module | None = None

    def forward(self, x_TE: torch.Tensor) -> torch.Tensor:
        out_TE: torch.Tensor = self.experts(x_TE, self.gate(x_TE), self.gate.e_score_correction_bias)
        if self.shared is None:
            return out_TE
        if self.shared_gate is None:
            return total(*self.shared.add(x_TE, out_TE))
        shared_TE: torch.Tensor = self.shared(x_TE) * self.shared_gate(x_TE).sigmoid()
        return out_TE + shared_TE

    def add(self, x_TE: torch.Tensor, residual_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The result and the residual: experts are weighed before they are added."""
        return self(x_TE), residual_TE
