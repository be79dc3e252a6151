"""Tier 2: every provider of every op, and the reference where there is none, against the float32 reference."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fairlead.interface import UNQUANTIZED
from fairlead.ops import reference
from fairlead.ops.table import OP_NAMES, REFERENCE, TOLERANCE
from fairlead.testing.conformance import arguments
from fairlead.testing.conformance.arguments import Arguments
from fairlead.testing.conformance.check import Check, Outcome
from fairlead.testing.conformance.subject import Subject

BY_ROW = ("positions_T", "logits_TX", "h_NR", "adapter_N")  # beside an op's own rows


def checks(subject: Subject) -> Iterator[Check]:
    """One per op, provider and dtype."""
    own = subject.platform.ops()
    for op in OP_NAMES:
        providers = [(p.name, p.fn, p.refuses) for p in own.get(op, ())]
        if not providers:
            providers = [(REFERENCE, getattr(reference, op), lambda dtype: None)]
        for name, fn, refuses in providers:
            for dtype in subject.dtypes:
                examined = _Provider(subject, op, name, fn, dtype)
                run = _refusal(refuses(dtype)) or examined.run
                yield Check(tier="ops", name=f"{op}, {name}, {dtype}", hook=examined.hook, run=run)


def _refusal(reason: str | None) -> Callable[[], Outcome] | None:
    return None if reason is None else lambda: Outcome(status="unsupported", reason=reason)


class _Provider:
    """One implementation of one op in one dtype."""

    def __init__(self, subject: Subject, op: str, name: str, fn: Callable[..., Any], dtype: str) -> None:
        self.s, self.op, self.fn, self.name = subject, op, fn, name
        self.hook = f"ops[{op!r}] {name!r}"
        self.dtype_name, self.dtype = dtype, getattr(torch, dtype)
        self.tolerance = TOLERANCE[dtype]
        self.reference: Callable[..., Any] = getattr(reference, op)

    def run(self) -> Outcome:
        """All shapes, contiguous and as views of wider tensors; then rows on their own and rows of NaN."""
        errors = []
        row_counts = self.s.row_counts(self.s.pick(arguments.ROWS, arguments.MORE_ROWS))
        widths = self.s.pick(arguments.WIDTHS, arguments.MORE_WIDTHS)
        for call in arguments.of(self.op, row_counts, widths):
            rounded = self._rounded(call)
            for is_strided in (False, True) if call.rows else (False,):
                errors.append(self.compare(rounded, is_strided))
            self.check_rows(rounded)
        return self.s.judge(errors, self.tolerance, is_reference=self.name == REFERENCE)

    def compare(self, call: Arguments, is_strided: bool) -> float:
        """The largest error of one call."""
        where = f"{call.where}, {'strided' if is_strided else 'contiguous'}"
        like = _called(self.reference, call.mapped(lambda _, t: t.clone()))
        wanted = _called(self.reference, call.mapped(lambda n, t: t.clone() if n in call.exact else _widened(t)))
        placed = call.mapped(lambda name, t: self._place(t, is_strided and name in call.rows))
        inputs = {name: tensor for name, tensor in placed.tensors.items() if name != call.written}
        outputs = self._outputs_of(placed, inputs, where)
        self.s.expect(len(outputs) == len(like), self.hook, f"{len(like)} tensors for {where}", f"{len(outputs)}")
        for output, one_like in zip(outputs, like, strict=True):
            self.s.check_tensor(self.hook, output, one_like, where)
        pairs = zip(outputs, wanted, strict=True)
        return max(self.s.compare(self.hook, got, want, self.tolerance, where) for got, want in pairs)

    def _outputs_of(self, placed: Arguments, inputs: dict[str, torch.Tensor], where: str) -> tuple[Any, ...]:
        """What it returned, or what it has written to."""
        found = self.s.check_inputs(self.hook, lambda: self._call(placed), inputs, where)
        if placed.written is None:
            return found if isinstance(found, tuple) else (found,)
        self.s.expect(found is None, self.hook, f"None, since it writes to {placed.written}", type(found).__name__)
        return (placed.values[placed.written],)

    def _rounded(self, call: Arguments) -> Arguments:
        """With the tensors in the dtype."""
        return call.mapped(lambda n, t: t if n in call.exact or not t.is_floating_point() else t.to(self.dtype))

    def check_rows(self, call: Arguments) -> None:
        """NaN in one row stays in it; where results are said not to depend on the batch, a row alone is the same."""
        if not call.rows or self.op == "apply_token_bitmask" or not self.s.platform.capabilities.computes:
            return
        num_rows = len(call.values[call.rows[0]])
        if num_rows < 2:
            return
        row = num_rows // 2
        others = [i for i in range(num_rows) if i != row]
        plain = call.mapped(lambda name, t: self._place(t, False))
        poisoned = call.mapped(lambda name, t: self._place(_poisoned(t, row) if name in call.rows else t, False))
        for clean, dirty in zip(self._outputs(plain), self._outputs(poisoned), strict=True):
            expected = f"rows beside one of NaN as they are without it, for {call.where}"
            self.s.compare(self.hook, dirty[others], clean[others].float(), self.tolerance, expected)
        if self._is_invariant():
            alone = call.mapped(lambda name, t: self._place(self._row(call, name, t, row), False))
            for many, one in zip(self._outputs(plain), self._outputs(alone), strict=True):
                expected = f"the bits of a row whatever its batch (capabilities.batch_invariant), for {call.where}"
                self.s.expect(torch.equal(many[row], one[0]), self.hook, expected, "others")

    def _is_invariant(self) -> bool:
        """Whether the platform says so of what it runs by default; the others it need not answer for."""
        capabilities = self.s.platform.capabilities
        if not capabilities.batch_invariant or capabilities.static_shapes:
            return False
        own = self.s.platform.ops().get(self.op, ())
        has_methods = UNQUANTIZED in self.s.platform.linear_methods()
        if has_methods and (self.op == "linear" or (self.op == "moe" and not own)):
            return False  # the platform's linear methods run in its place
        usable = [p for p in own if p.priority > 0 and p.refuses(self.dtype_name) is None]
        chosen = max(usable, key=lambda p: p.priority).name if usable else REFERENCE
        return self.name == chosen

    def _row(self, call: Arguments, name: str, tensor: torch.Tensor, row: int) -> torch.Tensor:
        """One row of what has a row per token."""
        is_by_row = name in call.rows or name in BY_ROW
        return tensor[row : row + 1] if is_by_row else tensor

    def _outputs(self, call: Arguments) -> list[torch.Tensor]:
        return [self.s.to_host(t) for t in _tensors(self._call(call))]

    def _call(self, call: Arguments) -> Any:
        with torch.inference_mode():
            return self.fn(*call.values.values())

    def _place(self, tensor: torch.Tensor, is_strided: bool) -> torch.Tensor:
        there = self.s.to_device(tensor.clone())
        if not is_strided:
            return there
        width = tensor.shape[-1]
        wide = self.s.to_device(torch.full((*tensor.shape[:-1], 3 * width), 7.0, dtype=tensor.dtype))
        wide[..., width : 2 * width] = there
        return wide[..., width : 2 * width]


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _poisoned(tensor: torch.Tensor, row: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[row] = torch.nan
    return changed


def _called(fn: Callable[..., Any], call: Arguments) -> list[torch.Tensor]:
    """The results of a function that keeps to the contract."""
    result = fn(*call.values.values())
    return _tensors(result if call.written is None else call.values[call.written])


def _tensors(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
