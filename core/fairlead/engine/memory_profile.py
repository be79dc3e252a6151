"""Measures what the largest step of a loaded model needs beside its weights and its KV cache.

A step of `max_num_batched_tokens` would take minutes for a large model on a small device. What a forward pass needs
grows linearly with its tokens: two small steps tell how, with the longest context in both. What logits and sampling
need grows with the rows that are sampled, and is told by a few of them in the same way, without a forward pass.

Shapes: T tokens of the largest step, R rows that it samples, E model width.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import torch

from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.planner import EnginePlan
from fairlead.request import SamplingParams
from fairlead.sampling.sampler import SamplingBatch, sample
from fairlead.scheduling.batch import ScheduledBatch, ScheduledChunk
from fairlead.scheduling.block_manager import blocks_per_sequence

_SAMPLING = SamplingParams(temperature=1.0, top_p=0.9, top_k=50)  # of the common ones, what takes most memory
_TOKENS = (32, 96)  # of the two steps
_ROWS = (8, 32)  # of the two samplings


def measure_activations(plan: EnginePlan, runner: ModelRunner) -> int | None:
    """Peak bytes of the largest step; None where the platform cannot tell. Its cache is allocated and freed again."""
    settings = plan.settings
    num_blocks = [
        blocks_per_sequence(
            group.sliding_window, settings.max_model_len, settings.block_size, settings.max_num_batched_tokens
        )
        for group in plan.cache_groups
    ]
    most = settings.max_num_batched_tokens
    steps = [step_of(plan, num_blocks, min(size, most)) for size in _TOKENS]
    runner.allocate_cache(num_blocks)
    try:
        for group, (backend, kv_caches) in enumerate(zip(runner.backends, runner.kv_caches, strict=True)):
            # What a step is the first to write of the cache would count as its own.
            written = sorted(set().union(*(_written(c, group, settings.block_size) for c in steps[-1].chunks)))
            backend.copy_blocks(kv_caches, list(zip([*written[1:], written[0]], written, strict=True)))
        width = _forward(runner, steps[0]).shape[1]
        forward = [_peak(plan, partial(_forward, runner, step)) for step in steps]
    finally:
        runner.kv_caches = []
    num_rows = min(settings.max_num_seqs, most)
    rows = [_sampled_rows(plan, width, min(size, num_rows)) for size in _ROWS]
    _sample(runner, *rows[0])  # as above: code counts, too, where it is the first to run
    logits = [_peak(plan, partial(_sample, runner, *batch)) for batch in rows]
    forward_bytes = _extrapolated([step.num_tokens for step in steps], forward, most)
    logits_bytes = _extrapolated([len(hidden_RE) for hidden_RE, _ in rows], logits, num_rows)
    if forward_bytes is None or logits_bytes is None:
        return None
    return max(forward_bytes, logits_bytes + most * width * rows[0][0].itemsize)


def _extrapolated(sizes: Seq[int], peaks: Seq[int | None], size: int) -> int | None:
    """The peak at a size that is at least the second of two, from those at both; None if one of them is."""
    small, large = peaks
    if small is None or large is None:
        return None
    return large + math.ceil(max(large - small, 0) / max(sizes[1] - sizes[0], 1) * (size - sizes[1]))


def _forward(runner: ModelRunner, batch: ScheduledBatch) -> torch.Tensor:
    """As it comes: a graph of this step would outlive its cache."""
    prepared = runner.prepare(batch)
    return runner.model(prepared.inputs.token_ids_T, prepared.inputs.positions_T, prepared.step)


def _sample(runner: ModelRunner, hidden_RE: torch.Tensor, samplers: SamplingBatch) -> None:
    sample(runner.padded.logits(hidden_RE), samplers)


def _peak(plan: EnginePlan, work: Callable[[], object]) -> int | None:
    @torch.inference_mode()
    def run() -> None:
        work()

    profile = plan.platform.memory_profile(run)
    return None if profile is None else profile.peak_bytes


def _sampled_rows(plan: EnginePlan, width: int, num_rows: int) -> tuple[torch.Tensor, SamplingBatch]:
    """So many rows of hidden states, and how they are sampled."""
    dtype: torch.dtype = getattr(torch, plan.settings.dtype)
    hidden_RE = torch.zeros((num_rows, width), dtype=dtype, device=plan.platform.torch_device)
    chunk = ScheduledChunk(
        seq_id=0, token_ids=(0,), start=0, block_tables=(), params=_SAMPLING, sample_seed=0, position=1
    )
    return hidden_RE, SamplingBatch.of([chunk] * num_rows)


def step_of(plan: EnginePlan, num_blocks: Seq[int], num_tokens: int) -> ScheduledBatch:
    """A step of so many tokens that samples nothing: one is the last of the longest context, the others are prompts.

    The sequences share their blocks; nobody reads what comes out.
    """
    settings = plan.settings
    chunks: list[ScheduledChunk] = []
    longest, spare = settings.max_model_len, num_tokens
    while spare:
        start, length = (0, min(spare, longest - 1)) if chunks else (longest - 1, 1)
        spare -= length
        tables = tuple(
            _table(group.sliding_window, start, length, settings.block_size, n)
            for group, n in zip(plan.cache_groups, num_blocks, strict=True)
        )
        chunks.append(
            ScheduledChunk(
                seq_id=len(chunks),
                token_ids=(0,) * length,
                start=start,
                block_tables=tables,
                params=_SAMPLING,
                sample_seed=None,
                position=start + length,
            )
        )
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
