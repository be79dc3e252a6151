"""What all steps share: the card and its clock, cases that can be taken up again, and the files they write."""

import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fairlead import plugins
from fairlead.config import PlatformConfig
from fairlead.errors import one_line

Case = dict[str, Any]
"""What one measurement found, as JSON has it; seconds, bytes and shares by name."""

PACKAGES = ("fairlead", "torch", "triton", "transformers", "numpy", "msgspec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one run. `deadline` is by time.monotonic(); a case that has begun is ended, none is begun after it."""

    platform: str
    out: Path
    is_tiny: bool = False
    dtype: str = "bfloat16"
    deadline: float = float("inf")

    def pick(self, whole: Any, tiny: Any) -> Any:
        """One of two sizes; tiny ones prove that the code runs, and measure nothing."""
        return tiny if self.is_tiny else whole

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Of one call, in seconds. `method` is "graph" where calls were captured and replayed, so that none waits for
    Python, and "loop" where they were made one after the other."""

    median_s: float
    best_s: float
    method: str

    def as_case(self) -> Case:
        return {"seconds": self.median_s, "best_seconds": self.best_s, "method": self.method}


class Card:
    """The platform under test and its clock."""

    def __init__(self, settings: Settings) -> None:
        record, device = plugins.choose(PlatformConfig(platform=settings.platform))
        self.settings, self.info = settings, device
        self.platform = plugins.create(record, device)
        self.device: torch.device = self.platform.torch_device

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random numbers: on zeros some cards multiply faster than on data."""
        return torch.randn(shape, device=self.device).to(dtype or self.settings.torch_dtype)

    @torch.inference_mode()
    def time(self, work: Callable[[int], object], *, is_graphed: bool = True) -> Timing:
        """Times `work(i)`, called with rising i so that it can take another copy of its data each time."""
        least_s, repeats = self.settings.pick((0.02, 9), (0.0, 2))
        for i in range(3):  # what is compiled or chosen at the first call
            work(i)
        once = self._elapsed(lambda: work(0))
        calls = max(1, min(round(least_s / max(once, 1e-7)), 200))
        replay, method = self._captured(work, calls) if is_graphed else (None, "loop")

        def loop() -> None:
            for i in range(calls):
                work(i)

        run = replay or loop
        run()
        found = [self._elapsed(run) / calls for _ in range(repeats)]
        return Timing(median_s=statistics.median(found), best_s=min(found), method=method)

    @cached_property
    def copy_bytes_per_s(self) -> float:
        """The bandwidth of a large copy within the card's memory, bytes read and written together."""
        num_bytes: int = self.settings.pick(2 << 30, 8 << 20)
        source = torch.randint(-128, 127, (num_bytes,), dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.time(lambda i: target.copy_(source), is_graphed=False).median_s

    @cached_property
    def matmul_ops_per_s(self) -> float:
        """The rate of a large matrix product in the run's dtype, on random data, through torch."""
        size: int = self.settings.pick(8192, 128)
        a, b, out = (self.randn(size, size) for _ in range(3))
        return 2 * size**3 / self.time(lambda i: torch.mm(a, b, out=out), is_graphed=False).median_s

    def measure_ceilings(self) -> None:
        """Both, now: before an engine takes the card's memory."""
        assert self.copy_bytes_per_s > 0
        assert self.matmul_ops_per_s > 0

    def _elapsed(self, run: Callable[[], object]) -> float:
        self.platform.synchronize()
        start = time.perf_counter()
        run()
        self.platform.synchronize()
        return time.perf_counter() - start

    def _captured(self, work: Callable[[int], object], calls: int) -> tuple[Callable[[], object] | None, str]:
        """A replay of so many calls, where torch has graphs for this device and the work can be captured."""
        module: Any = None if self.device.type == "cpu" else torch.get_device_module(self.device)
        kind = next((name for name in ("CUDAGraph", "XPUGraph") if hasattr(module, name)), None)
        if kind is None:
            return None, "loop"
        graph = getattr(module, kind)()
        try:
            with module.graph(graph):
                for i in range(calls):
                    work(i)
        except RuntimeError as error:
            self.platform.synchronize()
            return None, f"loop (no capture: {one_line(error)[:120]})"
        replay: Callable[[], object] = graph.replay
        return replay, "graph"


class Results:
    """The JSON file of one step. Each case is saved when it is over, so that a run that was cut off goes on."""

    def __init__(self, out: Path, step: str) -> None:
        self.path = out / f"{step}.json"
        self.data: dict[str, Any] = {"environment": {}, "cases": {}}
        if self.path.is_file():
            self.data = json.loads(self.path.read_text(encoding="utf-8"))

    def begin(self, environment: dict[str, Any]) -> None:
        """Notes where this runs. Raises SystemExit if the file has figures of another card or other sizes."""
        before = self.data["environment"]
        other = [key for key in ("platform", "device", "dtype", "is_tiny") if before.get(key) != environment[key]]
        if self.cases and other:
            raise SystemExit(
                f"error: {self.path} holds figures of another run ({other[0]}: {before.get(other[0])}, now "
                f"{environment[other[0]]}); give another --out"
            )
        self.data["environment"] = environment

    @property
    def cases(self) -> dict[str, Case]:
        found: dict[str, Case] = self.data["cases"]
        return found

    def is_done(self, name: str) -> bool:
        return name in self.cases and "failed" not in self.cases[name]

    def save(self, name: str, case: Case) -> None:
        self.cases[name] = case
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1), encoding="utf-8")


def environment(card: Card) -> dict[str, Any]:
    """What the figures depend on. Without msgspec the engine's records cost more (fairlead.records)."""
    found: dict[str, Any] = {}
    for name in PACKAGES:
        found[name] = importlib.metadata.version(name) if importlib.util.find_spec(name) else "not installed"
    return {
        **found,
        "platform": card.settings.platform,
        "device": card.info.description,
        "dtype": card.settings.dtype,
        "is_tiny": card.settings.is_tiny,
    }


def run_cases(results: Results, cases: Iterable[tuple[str, Callable[[], Case]]], deadline: float) -> list[str]:
    """Runs those that are not done; returns the names of those for which no time was left.

    A case that raises is recorded with what it raised, and is run again the next time.
    """
    left_over = []
    for name, run in cases:
        if results.is_done(name):
            continue
        if time.monotonic() > deadline:
            left_over.append(name)
            continue
        start = time.perf_counter()
        try:
            case = run()
        except Exception as error:  # the other cases are worth having
            case = {"failed": one_line(error)}
        case["took_s"] = round(time.perf_counter() - start, 2)
        results.save(name, case)
        print(f"{results.path.stem}: {name}: {summary(case)}", flush=True)
    return left_over


def summary(case: Case) -> str:
    """The case on one line."""
    parts = []
    for name, value in case.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(f"{name} {text[:100]}")
    return ", ".join(parts)


def profiled(card: Card, work: Callable[[], object], path: Path) -> None:
    """Writes torch's table of where the time of some work goes, by op and kernel."""
    is_host = card.device.type == "cpu"
    everything: Any = torch.profiler.supported_activities  # untyped
    with torch.profiler.profile(activities=everything()) as profile, torch.inference_mode():
        work()
        card.platform.synchronize()
    order = "self_cpu_time_total" if is_host else "self_device_time_total"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
    path.write_text(str(table), encoding="utf-8")
