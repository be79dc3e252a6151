"""The step's tensors against a token-by-token rebuild."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fairlead.engine.batch_builder import build_input
from fairlead.request import SamplingParams
from fairlead.scheduling.batch import ScheduledBatch, ScheduledChunk


def chunk(token_ids: Sequence[int], start: int, table: Sequence[int], seed: int | None = 7) -> ScheduledChunk:
    return ScheduledChunk(
        seq_id=0,
        token_ids=tuple(token_ids),
        start=start,
        block_tables=((0, tuple(table)),),
        params=SamplingParams(),
        sample_seed=seed,
        position=start + len(token_ids),
    )


def check(chunks: list[ScheduledChunk], block_size: int) -> None:
    found = build_input(ScheduledBatch(chunks=tuple(chunks), block_copies=()), block_size, torch.device("cpu"))
    token_ids, positions, slots, sample_rows = [], [], [], []
    for c in chunks:
        for offset, token_id in enumerate(c.token_ids):
            position = c.start + offset
            token_ids.append(token_id)
            positions.append(position)
            slots.append(c.block_tables[0][1][position // block_size] * block_size + position % block_size)
        if c.sample_seed is not None:
            sample_rows.append(len(token_ids) - 1)
    assert found.token_ids_T.tolist() == token_ids
    assert found.positions_T.tolist() == positions
    assert found.sample_rows_R.tolist() == sample_rows
    assert all(t.dtype == torch.int64 for t in (found.token_ids_T, found.positions_T, found.sample_rows_R))
    (metadata,) = found.attention
    assert metadata.slot_mapping_T.tolist() == slots
    assert metadata.query_lens_S.tolist() == [len(c.token_ids) for c in chunks]
    assert metadata.seq_lens_S.tolist() == [c.start + len(c.token_ids) for c in chunks]
    width = max(len(c.block_tables[0][1]) for c in chunks)
    assert metadata.block_tables_SB.tolist() == [
        [*c.block_tables[0][1], *[0] * (width - len(c.block_tables[0][1]))] for c in chunks
    ]
    arrays = (metadata.query_lens_S, metadata.seq_lens_S, metadata.block_tables_SB, metadata.slot_mapping_T)
    assert all(a.dtype == np.int32 for a in arrays)


def test_one_token() -> None:
    check([chunk([5], 0, [3])], 16)


def test_a_decode_at_block_edges() -> None:
    for start in (14, 15, 16, 17):
        check([chunk([5], start, [9, 4])], 16)


def test_a_chunk_over_several_blocks() -> None:
    check([chunk(range(100, 140), 7, [9, 4, 0, 2])], 16)


def test_chunks_that_do_not_sample() -> None:
    check([chunk([1, 2], 0, [1], seed=None), chunk([3], 4, [2]), chunk([4, 5, 6], 0, [5], seed=None)], 8)
    check([chunk([1, 2], 0, [1], seed=None)], 8)


def test_a_seed_of_zero_samples() -> None:
    check([chunk([1], 0, [1], seed=0)], 8)


@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
def test_random_batches(block_size: int) -> None:
    rng = np.random.default_rng(block_size)
    for _ in range(20):
        chunks = []
        for _ in range(int(rng.integers(1, 12))):
            start, size = int(rng.choice([0, rng.integers(0, 200)])), int(rng.choice([1, rng.integers(1, 60)]))
            needed = -(-(start + size) // block_size)
            table = rng.integers(0, 10_000, needed + int(rng.integers(0, 2))).tolist()
            seed = None if rng.random() < 0.3 else int(rng.integers(2**32))
            chunks.append(chunk(rng.integers(0, 50_000, size).tolist(), start, table, seed))
        check(chunks, block_size)
