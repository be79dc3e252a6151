"""Tier 4: every method of every scheme of linear weights, and the reference where there is none.

Shapes: N rows, I input features, O output features, G groups of input features.
"""

import gc
from collections.abc import Iterator
from typing import Any

import torch

from fairlead.interface import ACTIVATIONS, UNQUANTIZED, ExpertsMethod, FusedLinearMethod, LinearShape
from fairlead.ops import reference
from fairlead.ops.linear import INT4_GROUP, LinearTable
from fairlead.ops.table import REFERENCE
from fairlead.testing.conformance.check import Check
from fairlead.testing.conformance.experts import Experts
from fairlead.testing.conformance.fused import Fused
from fairlead.testing.conformance.method import MethodCheck
from fairlead.testing.conformance.subject import Subject

SIZES, MORE_SIZES = ((64, 48), (320, 131)), ((96, 96), (128, 576), (576, 1536))  # inputs, outputs
ROWS = (0, 1, 7, 33)
LEVELS = {"int8": 127, "int4": 7}  # the largest integer of a scheme
SMALLEST_FP8_MAX = 240  # of the kinds of E4M3, whose smallest steps are 2**-9 and 2**-10


def checks(subject: Subject) -> Iterator[Check]:
    """One per scheme, method and dtype."""
    table = LinearTable(subject.name, {}, reference.linear, allocator=subject.platform.allocator)
    own = subject.platform.linear_methods()
    for scheme in table.schemes:
        methods = own.get(scheme, ())
        for dtype in subject.dtypes:
            size = LinearShape(in_features=64, out_features=64, dtype=dtype)
            for i, method in enumerate(methods or (table.choose(scheme, size),)):
                name, own_name = f"{scheme}, {method.name}, {dtype}", repr(method.name) if methods else REFERENCE
                given: dict[str, Any] = {"name": own_name, "is_preferred": bool(methods) and i == 0}
                plain = _Method(subject, scheme, method, dtype, **given)
                plain.is_reference = not methods
                yield Check(tier="quantisation", name=name, hook=plain.method_hook, run=plain.run)
                for activation in (None, *ACTIVATIONS) if isinstance(method, FusedLinearMethod) else ():
                    fused = Fused(subject, scheme, method, dtype, activation=activation, **given)
                    yield Check(tier="quantisation", name=f"{name}, {fused.what}", hook=fused.hook, run=fused.run)
                if isinstance(method, ExpertsMethod):
                    experts = Experts(subject, scheme, method, dtype, **given)
                    yield Check(tier="quantisation", name=f"{name}, experts", hook=experts.hook, run=experts.run)


class _Method(MethodCheck):
    """Packs, multiplies rows of any number, and compares with what the packed weight stands for."""

    def cases(self) -> Iterator[tuple[LinearShape]]:
        """One for each size."""
        for num_inputs, num_outputs in self.s.pick(SIZES, MORE_SIZES):
            yield (LinearShape(in_features=num_inputs, out_features=num_outputs, dtype=self.dtype_name),)

    def refusal(self, shape: LinearShape) -> str | None:
        """Of the layer."""
        return self.method.refuses(shape)

    def examine(self, shape: LinearShape) -> list[float]:
        """What packing takes, what the packed weight is, and its products."""
        generator = torch.Generator().manual_seed(shape.in_features)
        size = (shape.out_features, shape.in_features)
        weight_OI = (torch.randn(size, generator=generator) * shape.in_features**-0.5).to(self.dtype)
        allocator = self.s.platform.allocator
        gc.collect()
        before = allocator.allocated_bytes("weights")
        loaded: torch.Tensor | None = allocator.empty(size, self.dtype, tag="weights")
        assert loaded is not None
        loaded.copy_(weight_OI)
        packed = self.method.pack({"weight": loaded})
        loaded = None
        self._check_bytes(shape, allocator.allocated_bytes("weights") - before)
        dequantised_OI = self._dequantised(packed, weight_OI)
        errors = []
        for num_rows in self.s.row_counts(ROWS):
            for bias_O in (None, torch.randn(shape.out_features, generator=generator).to(self.dtype)):
                x_NI = torch.randn(num_rows, shape.in_features, generator=generator).to(self.dtype)
                errors.append(self._multiply(packed, dequantised_OI, x_NI, bias_O))
        return errors

    def _check_bytes(self, shape: LinearShape, taken: int) -> None:
        size, hook = self.method.packed_bytes(shape), f"{self.method_hook}.packed_bytes"
        self.s.expect(type(size) is int and size > 0, hook, "an integer above 0", repr(size))
        expected = f"what is left after pack, {taken} bytes, or more"
        self.s.expect(taken <= size, hook, expected, size)

    def _dequantised(self, packed: object, weight_OI: torch.Tensor) -> torch.Tensor:
        """On the host, in float32; no further from the weight than the scheme's rounding."""
        hook, where = f"{self.method_hook}.dequantise", f"a weight of shape {tuple(weight_OI.shape)}"
        got = self.method.dequantise(packed)
        like = torch.empty(weight_OI.shape, dtype=got.dtype if isinstance(got, torch.Tensor) else torch.float32)
        found = self.s.to_host(self.s.check_tensor(hook, got, like, where)).float()
        if self.s.platform.capabilities.computes:
            off = (found - weight_OI.float()).abs() - self._rounding(weight_OI.float())
            worst = float(off.max())
            expected = f"weights within a step of {self.scheme} of those packed"
            self.s.expect(worst <= 0, hook, expected, f"one that is off by {worst:.2e} more")
        return found

    def _rounding(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """How far each weight may be off: half a step by rounding, a whole one where an uneven range clips it."""
        if self.scheme == UNQUANTIZED:
            return torch.zeros_like(weight_OI)
        if self.scheme == "fp8":  # 3 bits of mantissa; below the normal numbers a step of their own
            largest = weight_OI.abs().amax(1, keepdim=True)
            return weight_OI.abs() * (2**-4 + 2**-8) * 1.01 + largest * 2**-9 / SMALLEST_FP8_MAX
        groups = torch.split(weight_OI, INT4_GROUP if self.scheme == "int4" else weight_OI.shape[1], dim=1)
        steps = [group.abs().amax(1, keepdim=True).expand_as(group) / LEVELS[self.scheme] for group in groups]
        return torch.cat(steps, dim=1) * 1.01 + weight_OI.abs() * 2**-8  # scales and results may be rounded too

    def _multiply(
        self, packed: object, weight_OI: torch.Tensor, x_NI: torch.Tensor, bias_O: torch.Tensor | None
    ) -> float:
        where = f"{len(x_NI)} rows, {weight_OI.shape[1]} to {weight_OI.shape[0]}, bias {bias_O is not None}"
        want = torch.nn.functional.linear(x_NI.float(), weight_OI, None if bias_O is None else bias_O.float())
        wide = self.s.to_device(torch.cat([x_NI, x_NI], dim=1))
        inputs = {"x": wide[:, : x_NI.shape[1]]}  # a strided view, as a layer gets it from a merged one
        bias = None if bias_O is None else self.s.to_device(bias_O)
        with torch.inference_mode():
            got = self.s.check_inputs(self.hook, lambda: self.method.apply(inputs["x"], packed, bias), inputs, where)
        self.s.check_tensor(self.hook, got, want.to(x_NI.dtype), where)
        return self.error_of(got, want, where)
