"""What the checks of a linear method have in common: cases, refusals, the tolerance of norms, the bits of a row."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from fairlead.interface import LinearMethod
from fairlead.ops.linear import TOLERANCE
from fairlead.testing.conformance.check import Outcome
from fairlead.testing.conformance.subject import Subject


class MethodCheck(ABC):
    """One method of a scheme in one dtype. `ending` is that of the calls examined: of apply_fused it is "_fused".

    `is_preferred` holds for the platform's first method of the scheme: what the capabilities promise is said of it.
    """

    ending: ClassVar[str] = ""
    is_reference = False

    def __init__(
        self, subject: Subject, scheme: str, method: LinearMethod, dtype: str, *, name: str, is_preferred: bool
    ) -> None:
        self.s, self.scheme, self.method = subject, scheme, method
        self.method_hook = f"linear_methods[{scheme!r}] {name}"
        self.hook = f"{self.method_hook}.apply{self.ending}"
        self.dtype_name, self.tolerance = dtype, TOLERANCE[scheme][dtype]
        self.dtype: torch.dtype = getattr(torch, dtype)
        can = subject.platform.capabilities
        self.is_invariant = can.batch_invariant and not can.static_shapes and can.computes and is_preferred

    @abstractmethod
    def cases(self) -> Iterator[tuple[Any, ...]]:
        """Arguments of the two below."""

    @abstractmethod
    def refusal(self, *case: Any) -> str | None:
        """Why the method does not take a case, by its own account."""

    @abstractmethod
    def examine(self, *case: Any) -> list[float]:
        """Convicts what is wrong; returns the errors of what is right."""

    def run(self) -> Outcome:
        """Examines the cases that the method takes."""
        errors, reasons = [], []
        for case in self.cases():
            reason = self.refusal(*case)
            if reason is None:
                errors += self.examine(*case)
                continue
            hook = f"{self.method_hook}.refuses{self.ending}"
            self.s.expect(isinstance(reason, str) and bool(reason), hook, "a reason", repr(reason))
            reasons.append(reason)
        if not errors:
            return Outcome(status="unsupported", reason=reasons[0])
        return self.s.judge(errors, self.tolerance, is_reference=self.is_reference)

    def error_of(self, got: torch.Tensor, want: torch.Tensor, where: str) -> float:
        """The norm of the difference over that of what is wanted, float32 on the host; convicts one above the
        tolerance, and NaN."""
        if not self.s.platform.capabilities.computes or not want.numel():
            return 0.0
        found = self.s.to_host(got).float()
        self.s.expect(not found.isnan().any(), self.hook, f"numbers for {where}", "NaN")
        error = float((found - want).norm() / want.norm())
        expected = f"an error of at most {self.tolerance:g} (of norms) for {where}"
        self.s.expect(error <= self.tolerance, self.hook, expected, f"{error:.2e}")
        return error

    def expect_same_bits(self, alone: torch.Tensor, together: torch.Tensor, where: str) -> None:
        """Convicts rows that are others in a batch than by themselves."""
        expected = f"the bits of a row whatever its batch (capabilities.batch_invariant), for {where}"
        self.s.expect(torch.equal(self.s.to_host(alone), self.s.to_host(together)), self.hook, expected, "others")
