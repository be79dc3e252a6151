"""Runs steps in order: each at once, or in a thread, so that the next is scheduled and prepared while one runs."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from fairlead.engine.model_runner import ModelRunner, PreparedStep
from fairlead.sampling.structured.policy import PendingBitmask
from fairlead.scheduling.batch import SampleContext, ScheduledBatch, StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingInputs:
    """What a step samples with, besides the logits; it follows from the tokens of all steps before."""

    contexts: Mapping[int, SampleContext]
    bitmask: PendingBitmask | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningStep:
    """A step on its way. The model runs at once; it samples when `sampling` is set."""

    prepared: PreparedStep
    sampling: "Future[SamplingInputs]" = field(default_factory=Future)
    outcome: "Future[StepResult]" = field(default_factory=Future)

    @property
    def batch(self) -> ScheduledBatch:
        return self.prepared.batch


class Pipeline:
    """Owns the thread, if steps are asynchronous. Without it, a step runs when its end is waited for."""

    def __init__(self, runner: ModelRunner, *, is_async: bool) -> None:
        self.is_async = is_async
        self._runner = runner
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fairlead-step") if is_async else None
        self._running: list[RunningStep] = []

    def launch(self, batch: ScheduledBatch) -> RunningStep:
        """Starts a step behind those that run; set its `sampling` when the one before is over."""
        step = RunningStep(prepared=self._runner.prepare(batch))
        self._running.append(step)
        if self._thread is not None:
            self._thread.submit(self._run, step)
        return step

    def wait(self, step: RunningStep) -> StepResult:
        """Waits for the end of the oldest step. Raises what it raised."""
        assert step is self._running[0]
        if self._thread is None:
            self._run(step)
        result = step.outcome.result()
        del self._running[0]
        return result

    def discard(self) -> None:
        """Gives up all steps; returns when nothing runs any more."""
        steps, self._running = self._running, []
        for step in steps:
            step.sampling.cancel()
        if self._thread is not None:
            wait([step.outcome for step in steps])

    def close(self) -> None:
        """Ends the thread, and what still runs in it."""
        self.discard()
        if self._thread is not None:
            self._thread.shutdown()

    def _run(self, step: RunningStep) -> None:
        try:
            hidden_TE = self._runner.forward(step.prepared)
            inputs = step.sampling.result()
            step.outcome.set_result(self._runner.sample(step.prepared, hidden_TE, inputs.contexts, inputs.bitmask))
        except BaseException as error:  # whatever it is, the engine's thread is the one to hear of it
            step.outcome.set_exception(error)
