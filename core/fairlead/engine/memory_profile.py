"""Measures what the largest step of a loaded model needs beside its weights and its KV cache."""

from collections.abc import Sequence as Seq

from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.planner import EnginePlan
from fairlead.request import SamplingParams
from fairlead.scheduling.batch import ScheduledBatch, ScheduledChunk
from fairlead.scheduling.block_manager import blocks_per_sequence

_SAMPLING = SamplingParams(temperature=1.0, top_p=0.9, top_k=50)  # of the common ones, what takes most memory


def measure_activations(plan: EnginePlan, runner: ModelRunner) -> int | None:
    """Peak bytes of the largest step; None where the platform cannot tell. Its cache is allocated and freed again."""
    settings = plan.settings
    num_blocks = [
        blocks_per_sequence(
            group.sliding_window, settings.max_model_len, settings.block_size, settings.max_num_batched_tokens
        )
        for group in plan.cache_groups
    ]
    batch = largest_step(plan, num_blocks)
    runner.allocate_cache(num_blocks)
    try:
        for group, (backend, kv_caches) in enumerate(zip(runner.backends, runner.kv_caches, strict=True)):
            # What the step is the first to write of the cache would count as its own.
            written = sorted(set().union(*(_written(c, group, settings.block_size) for c in batch.chunks)))
            backend.copy_blocks(kv_caches, list(zip([*written[1:], written[0]], written, strict=True)))
        profile = plan.platform.memory_profile(lambda: _run(runner, batch))
    finally:
        runner.kv_caches = []
    return None if profile is None else profile.peak_bytes


def _run(runner: ModelRunner, batch: ScheduledBatch) -> None:
    prepared = runner.prepare(batch)
    runner.sample(prepared, runner.forward(prepared), contexts={}, bitmask=None)


def largest_step(plan: EnginePlan, num_blocks: Seq[int]) -> ScheduledBatch:
    """As many sequences as may run, each of which samples: one decodes at the end of the longest context, the others
    are prompts that fill the step. They share their blocks; nobody reads what comes out."""
    settings = plan.settings
    longest, num_tokens = settings.max_model_len, settings.max_num_batched_tokens
    num_seqs = min(settings.max_num_seqs, num_tokens)
    spare, chunks = num_tokens - num_seqs, []
    for i in range(num_seqs):
        more = min(spare, longest - 1) if i else 0
        spare -= more
        start, length = 0 if i else longest - 1, 1 + more
        tables = tuple(
            _table(group.sliding_window, start, length, settings.block_size, n)
            for group, n in zip(plan.cache_groups, num_blocks, strict=True)
        )
        chunk = ScheduledChunk(
            seq_id=i,
            token_ids=(0,) * length,
            start=start,
            block_tables=tables,
            params=_SAMPLING,
            sample_seed=i,
            position=start + length,
        )
        chunks.append(chunk)
    return ScheduledBatch(chunks=tuple(chunks), block_copies=())


def _table(
    window: int | None, start: int, length: int, block_size: int, num_blocks: int
) -> tuple[int, tuple[int, ...]]:
    """The blocks that a chunk reads or writes: from the window of its first token on."""
    first = 0 if window is None else max(start - window + 1, 0) // block_size
    last = (start + length - 1) // block_size
    return first, tuple(i % num_blocks for i in range(last - first + 1))


def _written(chunk: ScheduledChunk, group: int, block_size: int) -> set[int]:
    first, blocks = chunk.block_tables[group]
    return set(blocks[chunk.start // block_size - first :])
