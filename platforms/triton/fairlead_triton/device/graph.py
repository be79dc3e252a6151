"""Decode steps captured once, and replayed.

Shapes: T packed tokens of a step (padding included), E model width.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from fairlead.ops.graph import smallest_bucket
from fairlead_triton.device.allocator import DeviceAllocator
from fairlead_triton.device.runtime import Graph, Runtime

logger = logging.getLogger("fairlead.graphs")
Forward = Callable[..., torch.Tensor]

BUCKETS = (1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32), *range(320, 513, 64))
"""Numbers of rows. The smaller a step, the more a row of padding weighs against the reading of the weights."""


@runtime_checkable
class ReplayablePlan(Protocol):
    """What an attention backend's plan is, for a step to be captured. Plans of another kind run as they come."""

    replayable: bool
    """Whether the launches depend on the number of tokens alone, and read what `load` writes."""

    def load(self) -> None:
        """Copies the step's integers to where the kernels read them, in the order of the current stream."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Capture:
    graph: Graph
    hidden_TE: torch.Tensor


class GraphCapturer:
    """GraphRunner that captures steps of decodes, a graph per bucket, and passes all others through.

    The graphs share the static inputs, of which a bucket reads the first rows, and one memory pool: what one leaves of
    it after a step, the next uses, so the largest is captured first. A capture lives as long as the addresses that it
    holds: no longer than until a pool moves. Where a capture fails, because the model asks the device for a
    value in its midst, steps of that size run as they come, and the log says so once.
    """

    def __init__(self, runtime: Runtime, allocator: DeviceAllocator, buckets: tuple[int, ...] = BUCKETS) -> None:
        self.buckets = buckets if runtime.new_graph is not None else ()
        self._runtime, self._allocator = runtime, allocator
        self._captures: dict[int, _Capture | None] = {}
        self._inputs: tuple[torch.Tensor, torch.Tensor] | None = None
        self._pool: Any = None
        self._stream: Any = None
        self._forward: Forward | None = None
        self._generation = allocator.generation
        allocator.add_holder(self)

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        """The next larger bucket for decodes; prompts are not padded."""
        return smallest_bucket(self.buckets, num_tokens) if max_query_len == 1 else None

    def run(self, forward: Forward, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Any) -> torch.Tensor:
        """Replays the step, capturing it first where there is no capture of its size."""
        self._runtime.make_current()
        num_rows = len(token_ids_T)
        plans = [group.plan for group in step.groups]
        if num_rows not in self.buckets or not all(isinstance(p, ReplayablePlan) and p.replayable for p in plans):
            return forward(token_ids_T, positions_T, step)
        if self._forward is not forward or self._generation != self._allocator.generation:
            self.release()
            self._forward, self._generation = forward, self._allocator.generation
        for plan in plans:
            plan.load()
        if num_rows not in self._captures:
            self._captures[num_rows] = self._capture(forward, *self._refill(token_ids_T, positions_T), step)
        capture = self._captures[num_rows]
        if capture is None:
            return forward(token_ids_T, positions_T, step)
        self._refill(token_ids_T, positions_T)
        capture.graph.replay()
        return capture.hidden_TE

    def release(self) -> None:
        """Drops all captures, and the memory of their pool with them."""
        if self._captures:
            self._runtime.synchronize()
        self._captures.clear()
        self._pool = self._inputs = self._forward = None

    def _refill(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies the inputs to where the captures read them; returns that place."""
        if self._inputs is None:
            most = self.buckets[-1]
            self._inputs = token_ids_T.new_zeros(most), positions_T.new_zeros(most)
        ids_T, at_T = (static[: len(token_ids_T)] for static in self._inputs)
        ids_T.copy_(token_ids_T)
        at_T.copy_(positions_T)
        return ids_T, at_T

    def _capture(
        self, forward: Forward, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Any
    ) -> _Capture | None:
        """Runs the step once, so that kernels are compiled and libraries have their workspaces; then captures it."""
        module, new_graph = self._runtime.module, self._runtime.new_graph
        assert new_graph is not None
        forward(token_ids_T, positions_T, step)
        self._runtime.synchronize()
        if self._pool is None:
            self._pool = module.graph_pool_handle()
        if self._stream is None:
            self._stream = module.Stream(self._runtime.index)
        graph = new_graph()
        try:
            with self._runtime.capture(graph, self._pool, self._stream):
                hidden_TE = forward(token_ids_T, positions_T, step)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            logger.warning("steps of %d rows are not captured as a graph: %.300s", len(token_ids_T), why)
            return None
        return _Capture(graph=graph, hidden_TE=hidden_TE)
