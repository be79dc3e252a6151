"""The platform under examination, and what the tiers ask of its tensors."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import torch

from fairlead import plugins
from fairlead.config import PlatformConfig
from fairlead.errors import PluginContractError
from fairlead.interface import Platform
from fairlead.testing.conformance.check import Outcome

NO_ARITHMETIC = "values: the device does no arithmetic (capabilities.computes is False)"


class Subject:
    """A platform chosen by name as a user would; created when a check first needs it.

    `full` sweeps more sizes. Raises PlatformUnavailableError with the reason if it cannot be used.
    """

    def __init__(self, name: str, device: str | None = None, *, full: bool = False) -> None:
        self.record, self.device = plugins.choose(PlatformConfig(platform=name, device=device))
        self.name, self.full = name, full

    @property
    def settings(self) -> dict[str, Any]:
        """Of an LLM on this platform."""
        return {"platform": self.name, "device": self.device.name}

    @cached_property
    def platform(self) -> Platform:
        return plugins.create(self.record, self.device)

    @property
    def is_created(self) -> bool:
        """Whether it could be created; if not, one check says why, and the others have nothing to ask."""
        try:
            return self.platform is not None
        except Exception:  # whatever it is, the check named "create" raises it again
            return False

    @property
    def package(self) -> str | None:
        """The plugin's top-level module; None for the core's own null platform."""
        package = type(self.platform).__module__.split(".")[0] if self.is_created else None
        return None if package == "fairlead" else package

    @property
    def dtypes(self) -> tuple[str, ...]:
        return self.platform.capabilities.dtypes

    def pick(self, quick: Sequence[Any], more: Sequence[Any]) -> list[Any]:
        """The quick values, and in a full sweep more of them."""
        return [*quick, *more] if self.full else list(quick)

    def row_counts(self, wanted: Sequence[int]) -> list[int]:
        """Numbers of rows to call with: those wanted, or buckets where the device runs nothing else."""
        if not self.platform.capabilities.static_shapes:
            return list(wanted)
        return list(self.platform.graph_runner().buckets[:3])

    def fail(self, hook: str, expected: str, got: object) -> NoReturn:
        """Convicts."""
        raise PluginContractError(plugin=self.name, hook=hook, expected=expected, got=str(got)[:300])

    def expect(self, holds: bool, hook: str, expected: str, got: object) -> None:
        """Convicts unless it holds."""
        if not holds:
            self.fail(hook, expected, got)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.platform.torch_device)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.platform.synchronize()
        return tensor.detach().cpu()

    def judge(self, errors: Sequence[float], tolerance: float, *, is_reference: bool = False) -> Outcome:
        """The outcome of comparisons that all kept to the tolerance."""
        status = "reference" if is_reference else "supported"
        if not self.platform.capabilities.computes:
            return Outcome(status="unsupported", reason=NO_ARITHMETIC)
        return Outcome(status=status, error=max(errors, default=0.0), tolerance=tolerance)

    def check_tensor(self, hook: str, got: object, like: torch.Tensor, where: str) -> torch.Tensor:
        """Convicts a result that is no tensor of this shape and dtype on the platform's device; returns it."""
        if not isinstance(got, torch.Tensor):
            self.fail(hook, f"a tensor {_describe(like)} for {where}", "None" if got is None else type(got).__name__)
        if (got.shape, got.dtype) != (like.shape, like.dtype):
            self.fail(hook, f"{_describe(like)} for {where}", _describe(got))
        device = self.platform.torch_device
        if got.device.type != device.type or device.index not in (None, got.device.index):
            self.fail(hook, f"a tensor on {device} for {where}", f"one on {got.device}")
        return got

    def compare(self, hook: str, got: torch.Tensor, want: torch.Tensor, tolerance: float, where: str) -> float:
        """The largest error, absolute over 1 + |wanted|; convicts one above the tolerance, and NaN where none belongs.

        `want` is on the host, in float32 or as integers, which must be equal.
        """
        if not self.platform.capabilities.computes or not want.numel():
            return 0.0
        found = self.to_host(got)
        tolerance = tolerance if found.is_floating_point() else 0.0
        found = found.float()
        num_nan = int((found.isnan() & ~want.isnan()).sum())
        self.expect(not num_nan, hook, f"numbers for {where}", f"NaN in {num_nan} of {want.numel()} elements")
        same = (found == want) | want.isnan()
        want = want.float()
        errors = ((found - want).abs() / (1 + want.abs())).masked_fill(same, 0.0).nan_to_num(nan=torch.inf)
        worst = float(errors.max())
        if worst > tolerance:
            i = int(errors.argmax())
            value = f"{float(found.flatten()[i]):.6g}, an error of {worst:.2e} (element {i})"
            self.fail(hook, f"{float(want.flatten()[i]):.6g} within {tolerance:g} for {where}", value)
        return worst

    def check_inputs(
        self, hook: str, call: Callable[[], Any], inputs: Mapping[str, torch.Tensor], where: str, *, fresh: bool = True
    ) -> Any:
        """Calls; convicts if an input changed, or (with `fresh`) if writing to the result would change one."""
        before = {name: self.to_host(tensor).clone() for name, tensor in inputs.items()}
        result = call()
        self._expect_unchanged(hook, inputs, before, f"inputs unchanged for {where}", "was changed")
        if fresh:
            tensors = [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]
            kept = [self.to_host(tensor).clone() for tensor in tensors]
            with torch.inference_mode():
                for tensor in tensors:
                    tensor.fill_(3)
            expected = f"results that share no memory with inputs for {where}"
            self._expect_unchanged(hook, inputs, before, expected, "shares memory with a result")
            with torch.inference_mode():
                for tensor, value in zip(tensors, kept, strict=True):
                    tensor.copy_(value)
        return result

    def _expect_unchanged(
        self,
        hook: str,
        inputs: Mapping[str, torch.Tensor],
        before: Mapping[str, torch.Tensor],
        expected: str,
        what: str,
    ) -> None:
        for name, tensor in inputs.items():
            now = self.to_host(tensor)
            same = torch.equal(now.nan_to_num(), before[name].nan_to_num()) if now.is_floating_point() else None
            self.expect(torch.equal(now, before[name]) if same is None else same, hook, expected, f"{name} {what}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
