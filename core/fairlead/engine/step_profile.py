"""Where the time of steps goes, by op: every function of the platform that a model calls is timed, one call at a time.

That a graph or a recording is replayed hides the ops, so steps run as they come meanwhile; what this costs is told.
The device is waited for after each call, so that its time is counted where it arises.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, cast

import torch

from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.padded_model import PaddedModel
from fairlead.interface import GraphRunner
from fairlead.layers.attention import Attention
from fairlead.layers.linear import Linear
from fairlead.layers.moe import Experts
from fairlead.ops.first_call import FirstCall
from fairlead.ops.table import Ops

BETWEEN = "between ops"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTime:
    """One op in all forward passes of a size: how often it was called in each, and the seconds of all its calls."""

    op: str
    calls: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProfile:
    """All forward passes of `num_rows` rows: `seconds` of one on average, and of its ops, the dearest first.

    `BETWEEN` is what the model does besides: views, residuals, Python. The head, which makes the logits, is no part.
    """

    num_rows: int
    num_steps: int
    seconds: float
    ops: tuple[OpTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """Of some work: its forward passes by number of rows, the heads of all of them, and its seconds as a whole.

    `outside_s` is what is neither: scheduling, plans, sampling, output.
    """

    total_s: float
    head_s: float
    outside_s: float
    by_rows: tuple[RowProfile, ...]


class _Eager:
    """The platform's graph runner, but for replays: the same sizes, every step as it comes."""

    def __init__(self, graph_runner: GraphRunner) -> None:
        self._graph_runner = graph_runner
        self.buckets = graph_runner.buckets

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        return self._graph_runner.bucket(num_tokens, max_query_len)

    def run(
        self, forward: Callable[..., torch.Tensor], token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: object
    ) -> torch.Tensor:
        return forward(token_ids_T, positions_T, step)


class _Recorder:
    """Adds up. An op that calls another one counts without it."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._begun: list[float] = []
        self._inner: list[float] = []
        self.ops: dict[str, list[float]] = {}
        self.steps: dict[int, list[tuple[float, dict[str, list[float]]]]] = defaultdict(list)

    def begin(self) -> None:
        self._synchronize()
        self._inner.append(0.0)
        self._begun.append(time.perf_counter())

    def end(self, op: str) -> float:
        self._synchronize()
        seconds = time.perf_counter() - self._begun.pop()
        own = self.ops.setdefault(op, [0, 0.0])
        own[0] += 1
        own[1] += seconds - self._inner.pop()
        if self._inner:
            self._inner[-1] += seconds
        return seconds

    def timed(self, op: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.begin()
            try:
                return fn(*args)
            finally:
                self.end(op)

        return call


def profile_steps(
    runner: ModelRunner, ops: Ops, synchronize: Callable[[], None], work: Callable[[], object]
) -> StepProfile:
    """Runs the work, whose steps go through this runner, and tells where its time went. Steps must not overlap."""
    recorder = _Recorder(synchronize)
    with _watched(runner, ops, recorder):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        total_s = time.perf_counter() - start
    head_s = sum(seconds for _, seconds in recorder.ops.values())
    by_rows = tuple(_row_profile(rows, steps) for rows, steps in sorted(recorder.steps.items()))
    inside_s = sum(p.seconds * p.num_steps for p in by_rows)
    return StepProfile(total_s=total_s, head_s=head_s, outside_s=total_s - inside_s - head_s, by_rows=by_rows)


def _row_profile(num_rows: int, steps: list[tuple[float, dict[str, list[float]]]]) -> RowProfile:
    names = dict.fromkeys(name for _, found in steps for name in found)
    ops = [
        OpTime(
            op=name,
            calls=sum(found[name][0] for _, found in steps if name in found) / len(steps),
            seconds=sum(found[name][1] for _, found in steps if name in found) / len(steps),
        )
        for name in names
    ]
    return RowProfile(
        num_rows=num_rows,
        num_steps=len(steps),
        seconds=sum(seconds for seconds, _ in steps) / len(steps),
        ops=tuple(sorted(ops, key=lambda one: -one.seconds)),
    )


@contextmanager
def _watched(runner: ModelRunner, ops: Ops, recorder: _Recorder) -> Iterator[None]:
    """Puts timers around what the model's layers call, and takes them away again."""
    model = cast(torch.nn.Module, runner.model)
    names = {_function(getattr(ops, f.name)): f.name for f in fields(ops)}
    with ExitStack() as undo:
        for path, module in model.named_modules():
            for attribute, value in list(vars(module).items()):
                op = names.get(_function(value)) if callable(value) and not isinstance(value, type) else None
                if isinstance(module, Linear) and attribute == "_apply_method":
                    op = f"linear {path.rpartition('.')[2]}"
                if isinstance(module, Experts) and attribute == "_apply_experts" and value is not None:
                    op = "moe"
                if op is not None:
                    undo.callback(setattr, module, attribute, value)
                    setattr(module, attribute, recorder.timed(op, value))
            if isinstance(module, Attention):
                undo.enter_context(_hooked(module, recorder.begin, lambda out: recorder.end("attention")))
        outer: list[dict[str, list[float]]] = []

        def begin() -> None:
            outer.append(recorder.ops)
            recorder.ops = {}
            recorder.begin()

        def end(hidden_TE: torch.Tensor) -> None:
            seconds = recorder.end(BETWEEN)
            recorder.steps[len(hidden_TE)].append((seconds, recorder.ops))
            recorder.ops = outer.pop()

        undo.enter_context(_hooked(model, begin, end))
        padded = runner.padded
        undo.callback(setattr, runner, "padded", padded)
        runner.padded = PaddedModel(runner.model, _Eager(padded.graph_runner))
        yield


@contextmanager
def _hooked(
    module: torch.nn.Module, begin: Callable[[], None], end: Callable[[torch.Tensor], object]
) -> Iterator[None]:
    def before(module: torch.nn.Module, args: Any) -> None:
        begin()

    def after(module: torch.nn.Module, args: Any, out: torch.Tensor) -> None:
        end(out)

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _function(value: Any) -> Any:
    """What a FirstCall stands for; a key that equal bound methods share."""
    return value.fn if isinstance(value, FirstCall) else value
