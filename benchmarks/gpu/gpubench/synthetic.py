"""Steps made by hand: a model runner with sequences of any length, without computing their prompts first.

Shapes: S sequences, T tokens, K kv-heads, D head size, B blocks of a sequence.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch

from fairlead.interface import AttentionBackend, AttentionMetadata, AttentionSpec, KVCache
from fairlead.request import SamplingParams
from fairlead.scheduling.batch import ScheduledBatch, ScheduledChunk

GREEDY = SamplingParams(temperature=0, ignore_eos=True, detokenize=False)


def blocks_needed(num_seqs: int, context: int, block_size: int) -> int:
    """Blocks of so many sequences that share none."""
    return num_seqs * -(-context // block_size)


def tables(num_seqs: int, context: int, block_size: int) -> np.ndarray:
    """(S, B) int32: every sequence's own blocks, scattered over the cache as after some hours of work."""
    num_blocks = blocks_needed(num_seqs, context, block_size)
    return np.random.default_rng(0).permutation(num_blocks).reshape(num_seqs, -1).astype(np.int32)


def scheduled_step(
    num_seqs: int, num_new: int, context: int, block_size: int, vocab_size: int, *, num_groups: int = 1
) -> ScheduledBatch:
    """Each sequence computes the last `num_new` of its `context` tokens and samples one."""
    draw = random.Random(0)
    chunks = [
        ScheduledChunk(
            seq_id=i,
            token_ids=tuple(draw.randrange(vocab_size) for _ in range(num_new)),
            start=context - num_new,
            block_tables=((0, tuple(table.tolist())),) * num_groups,
            params=GREEDY,
            sample_seed=i,
            position=context,
        )
        for i, table in enumerate(tables(num_seqs, context, block_size))
    ]
    return ScheduledBatch(chunks=tuple(chunks), block_copies=())


def metadata_of(tables_SB: np.ndarray, num_new: int, context: int, block_size: int) -> AttentionMetadata:
    """The same step, as attention backends see it."""
    num_seqs = len(tables_SB)
    positions = np.arange(context - num_new, context)
    slots = tables_SB[:, positions // block_size] * block_size + positions % block_size
    return AttentionMetadata(
        query_lens_S=np.full(num_seqs, num_new, np.int32),
        seq_lens_S=np.full(num_seqs, context, np.int32),
        block_tables_SB=tables_SB,
        slot_mapping_T=slots.ravel().astype(np.int32),
    )


@torch.inference_mode()
def fill_cache(
    backend: AttentionBackend,
    layers: Sequence[KVCache],
    spec: AttentionSpec,
    num_blocks: int,
    block_size: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Writes random keys and values to all blocks, by short prompts of a block each: a backend's layout is its own."""
    at_a_time = max(4096 // block_size, 1)
    for first in range(0, num_blocks, at_a_time):
        rows = np.arange(first, min(first + at_a_time, num_blocks), dtype=np.int32)[:, None]
        num_tokens = len(rows) * block_size
        q = torch.randn(num_tokens, spec.num_heads, spec.head_size, device=device).to(dtype)
        k, v = (torch.randn(num_tokens, spec.num_kv_heads, spec.head_size, device=device).to(dtype) for _ in range(2))
        plan = backend.plan(metadata_of(rows, block_size, block_size, block_size))
        for cache in layers:
            backend.forward(q, k, v, cache, plan)
