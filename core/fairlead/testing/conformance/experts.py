"""Tier 4, for linear methods that run a mixture's experts: against their own products, expert by expert.

Shapes: T packed tokens, E model width, F width of an expert, X experts, N rows of an expert.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch

from fairlead.interface import ExpertsMethod, LinearShape, MoeSpec
from fairlead.ops import reference
from fairlead.testing.conformance.method import MethodCheck

SIZES, MORE_SIZES = ((64, 48),), ((96, 33), (320, 128))  # model width, width of an expert
TOKENS = (1, 7, 33)
SPECS = (
    MoeSpec(num_experts=5, top_k=2, normalize=True),
    MoeSpec(
        num_experts=8, top_k=3, scoring="sigmoid", normalize=True, scale=1.5, num_groups=4, top_groups=2, group_top=2
    ),
)


class Experts(MethodCheck):
    """Tokens of any number, by softmax and by sigmoids of groups."""

    ending = "_experts"

    @property
    def experts(self) -> ExpertsMethod:
        """The method, as what it is beside."""
        return cast(ExpertsMethod, self.method)

    def cases(self) -> Iterator[tuple[int, int, MoeSpec]]:
        """Each size with each kind of routing."""
        return ((E, F, spec) for E, F in self.s.pick(SIZES, MORE_SIZES) for spec in SPECS)

    def refusal(self, E: int, F: int, spec: MoeSpec) -> str | None:
        """Of one of the two layers, or of both as experts."""
        enter = LinearShape(in_features=E, out_features=2 * F, dtype=self.dtype_name)
        leave = LinearShape(in_features=F, out_features=E, dtype=self.dtype_name)
        refused = self.method.refuses(enter) or self.method.refuses(leave)
        return refused or self.experts.refuses_experts(enter, leave, spec)

    def examine(self, E: int, F: int, spec: MoeSpec) -> list[float]:
        """With logits of which no two of a token are alike, and x a view."""
        generator, X = torch.Generator().manual_seed(E), spec.num_experts

        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        gate_up_X2FE, down_XEF = (
            (drawn(X, 2 * F, E) * E**-0.5).to(self.dtype),
            (drawn(X, E, F) * F**-0.5).to(self.dtype),
        )
        tensors = {"gate_up": self.s.to_device(gate_up_X2FE.clone()), "down": self.s.to_device(down_XEF.clone())}
        packed = self.experts.pack_experts(tensors, spec)
        layers = [
            tuple(self.method.pack({"weight": self.s.to_device(weight.clone())}) for weight in pair)
            for pair in zip(gate_up_X2FE, down_XEF, strict=True)
        ]
        errors = []
        for num_tokens in self.s.row_counts(TOKENS):
            x_TE = drawn(num_tokens, E).to(self.dtype)
            order_TX = torch.rand((num_tokens, X), generator=generator).argsort(1)  # no two logits of a token alike
            given = {"x": torch.cat([x_TE, x_TE], dim=1), "logits": (order_TX * 0.5).to(self.dtype)}
            if spec.scoring == "sigmoid":
                given["correction"] = drawn(X) * 0.1
            inputs = {name: self.s.to_device(tensor) for name, tensor in given.items()}
            inputs["x"] = inputs["x"][:, :E]  # a strided view
            errors.append(self._compare(inputs, packed, layers, spec))
        return errors

    def _compare(
        self, inputs: dict[str, torch.Tensor], packed: object, layers: list[tuple[object, ...]], spec: MoeSpec
    ) -> float:
        x, logits, correction = inputs["x"], inputs["logits"], inputs.get("correction")
        where = f"{len(x)} tokens of {x.shape[1]}, {spec.scoring}, top {spec.top_k} of {spec.num_experts}"

        def run_expert(expert: int, rows_NE: torch.Tensor) -> torch.Tensor:
            enter, leave = layers[expert]
            with torch.inference_mode():
                inner = self.s.to_host(self.method.apply(self.s.to_device(rows_NE.to(self.dtype)), enter, None)).float()
                gated = self.s.to_device(reference.silu_and_mul(inner).to(self.dtype))
                return self.s.to_host(self.method.apply(gated, leave, None)).float()

        def call() -> Any:
            with torch.inference_mode():
                return self.experts.apply_experts(x, logits, correction, packed)

        got = self.s.check_inputs(self.hook, call, inputs, where)
        self.s.check_tensor(self.hook, got, torch.empty(x.shape, dtype=self.dtype), where)
        if not self.s.platform.capabilities.computes:
            return 0.0
        x_TE, logits_TX = self.s.to_host(x).float(), self.s.to_host(logits)
        correction_X = None if correction is None else self.s.to_host(correction)
        want = reference.moe_by_expert(x_TE, logits_TX, correction_X, spec, run_expert)
        error = self.error_of(got, want, where)
        if self.is_invariant:
            row = slice(len(x) // 2, len(x) // 2 + 1)
            with torch.inference_mode():
                one = self.experts.apply_experts(x[row], logits[row], correction, packed)
            self.expect_same_bits(one, got[row], where)
        return error
