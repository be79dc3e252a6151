"""Measures, when an engine is built, what decides whether a KV block is copied back from the host or computed again."""

import time
from collections.abc import Callable

from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.planner import EnginePlan
from fairlead.request import SamplingParams
from fairlead.scheduling.batch import BlockCopy, CopyKind, ScheduledBatch, ScheduledChunk
from fairlead.scheduling.host_tier import SwapCosts

_MAX_TOKENS = 256  # of the step that is timed
_MAX_BLOCKS = 8  # that are copied at a time


def measure(plan: EnginePlan, runner: ModelRunner) -> SwapCosts:
    """Times a step and copies, each twice, and takes the better. Call before the first step: it fills blocks with junk.

    A token's cost is its share of a prompt's chunk: on a long context it would cost more. So the copies are compared
    with the least that they can save.
    """

    def seconds(action: Callable[[], object]) -> float:
        times = []
        for _ in range(2):
            plan.platform.synchronize()
            start = time.perf_counter()
            action()
            plan.platform.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    def copying(kind: CopyKind, group: int, num_blocks: int) -> float:
        copies = [BlockCopy(kind=kind, group=group, source=i, destination=i) for i in range(num_blocks)]
        return seconds(lambda: runner.copy_blocks(copies))

    batch = _prompt(plan)
    token_s = seconds(lambda: runner.forward(runner.prepare(batch))) / batch.num_tokens
    out_s, in_s, overhead_s = [], [], 0.0
    for group, its in enumerate(plan.cache_groups):
        num_blocks = min(_MAX_BLOCKS, its.num_blocks, its.num_host_blocks)
        out_s.append(copying(CopyKind.OUT, group, num_blocks) / num_blocks)
        in_s.append(copying(CopyKind.IN, group, num_blocks) / num_blocks)
        overhead_s += max(copying(CopyKind.IN, group, 1) - in_s[-1], 0.0)
    return SwapCosts(out_s=tuple(out_s), in_s=tuple(in_s), overhead_s=overhead_s, token_s=token_s)


def describe(costs: SwapCosts, block_size: int) -> str:
    """One line for people."""
    copying, computing = 1e3 * (sum(costs.out_s) + sum(costs.in_s)), 1e3 * block_size * costs.token_s
    return f"{copying:.3f} ms to copy a block out and back, {computing:.3f} ms to compute it"


def _prompt(plan: EnginePlan) -> ScheduledBatch:
    """A step of one prompt that samples nothing."""
    settings = plan.settings
    num_tokens = min(_MAX_TOKENS, settings.max_num_batched_tokens, settings.max_model_len)
    blocks = tuple(range(-(-num_tokens // settings.block_size)))  # every group has as many: its least is a whole chunk
    chunk = ScheduledChunk(
        seq_id=0,
        token_ids=tuple(i % plan.shape.vocab_size for i in range(num_tokens)),
        start=0,
        block_tables=((0, blocks),) * len(plan.cache_groups),
        params=SamplingParams(),
        sample_seed=None,
        position=num_tokens,
    )
    return ScheduledBatch(chunks=(chunk,), block_copies=())
