"""Tier 4, for linear methods that do more than multiply: against the method's own product and what follows in float32.

Shapes: N rows, I input features, O output features of the weight, F of the result.
"""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.nn import functional

from fairlead.interface import GATED_ACTIVATIONS, FusedLinearMethod, LinearShape
from fairlead.ops import reference
from fairlead.testing.conformance.method import MethodCheck

SIZES, MORE_SIZES = ((64, 48), (320, 134)), ((96, 96), (576, 1536))  # inputs, outputs
ROWS = (0, 1, 7, 33)

MEANING: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x,
    "silu_and_mul": reference.silu_and_mul,
    "gelu_and_mul": reference.gelu_and_mul,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


class Fused(MethodCheck):
    """One activation, or a residual alone: rows of any number, with bias and residual and without."""

    ending = "_fused"

    def __init__(self, *args: Any, activation: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.activation, self.fused = activation, cast(FusedLinearMethod, self.method)
        self.what = "residual" if activation is None else f"{activation} and residual"

    def cases(self) -> Iterator[tuple[LinearShape]]:
        """One for each size."""
        for num_inputs, num_outputs in self.s.pick(SIZES, MORE_SIZES):
            yield (LinearShape(in_features=num_inputs, out_features=num_outputs, dtype=self.dtype_name),)

    def refusal(self, shape: LinearShape) -> str | None:
        """Of the layer, or of what follows."""
        return self.method.refuses(shape) or self.fused.refuses_fused(shape, self.activation)

    def examine(self, shape: LinearShape) -> list[float]:
        """Against the method's own product."""
        generator = torch.Generator().manual_seed(shape.in_features)

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(self.dtype)

        weight_OI = (drawn(shape.out_features, shape.in_features) * shape.in_features**-0.5).to(self.dtype)
        plain = self.method.pack({"weight": self.s.to_device(weight_OI.clone())})
        packed = plain
        if self.activation is not None:
            packed = self.fused.pack_fused({"weight": self.s.to_device(weight_OI.clone())}, self.activation)
            self._check_weight(plain, packed)
        width = shape.out_features // (2 if self.activation in GATED_ACTIVATIONS else 1)
        errors = []
        for num_rows in self.s.row_counts(ROWS):
            for bias_O in (None, drawn(shape.out_features)):
                x_NI = drawn(num_rows, shape.in_features)
                for residual_NF in (None, drawn(num_rows, width)):
                    errors.append(self._compare(plain, packed, x_NI, bias_O, residual_NF))
        return errors

    def _check_weight(self, plain: object, packed: object) -> None:
        hook = f"{self.method_hook}.dequantise"
        want, got = (self.s.to_host(self.method.dequantise(one)).float() for one in (plain, packed))
        self.s.expect(got.shape == want.shape, hook, f"{tuple(want.shape)} of a weight with {self.what}", got.shape)
        self.s.compare(hook, got, want, 1e-2, f"a weight with {self.what}")

    def _compare(
        self,
        plain: object,
        packed: object,
        x_NI: torch.Tensor,
        bias_O: torch.Tensor | None,
        residual_NF: torch.Tensor | None,
    ) -> float:
        has = ", ".join(f"{n} {t is not None}" for n, t in (("bias", bias_O), ("residual", residual_NF)))
        where = f"{len(x_NI)} rows of {x_NI.shape[1]}, {self.activation}, {has}"
        given = {"x": x_NI, "bias": bias_O, "residual": residual_NF}
        inputs = {name: self._strided(t) for name, t in given.items() if t is not None}
        x, bias, residual = (inputs.get(name) for name in given)
        assert x is not None

        def call() -> Any:
            with torch.inference_mode():
                return self.fused.apply_fused(x, packed, bias, residual)

        got = self.s.check_inputs(self.hook, call, inputs, where)
        with torch.inference_mode():
            product_NO = self.s.to_host(self.method.apply(x, plain, bias)).float()
        want_NF = MEANING[self.activation](product_NO)
        if residual_NF is not None:
            want_NF = want_NF + residual_NF.float()
        self.s.check_tensor(self.hook, got, want_NF.to(self.dtype), where)
        error = self.error_of(got, want_NF, where)
        if self.is_invariant and len(x_NI):
            row = slice(len(x_NI) // 2, len(x_NI) // 2 + 1)
            with torch.inference_mode():
                one = self.fused.apply_fused(x[row], packed, bias, None if residual is None else residual[row])
            self.expect_same_bits(one, got[row], where)
        return error

    def _strided(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows as views of a wider tensor, as layers get them from merged ones; a bias as it is."""
        if tensor.dim() == 1:
            return self.s.to_device(tensor)
        return self.s.to_device(torch.cat([tensor, tensor], dim=1))[:, : tensor.shape[1]]
