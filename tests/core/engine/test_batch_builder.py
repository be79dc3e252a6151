"""The step's tensors against a token-by-token rebuild."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fairlead.engine.batch_builder import build_input
from fairlead.request import SamplingParams
from fairlead.scheduling.batch import ScheduledBatch, ScheduledChunk

Table = tuple[int, Sequence[int]]


def chunk(token_ids: Sequence[int], start: int, *tables: Table, seed: int | None = 7) -> ScheduledChunk:
    """A table is (number of the first block held, blocks from there on), one per cache group."""
    return ScheduledChunk(
        seq_id=0,
        token_ids=tuple(token_ids),
        start=start,
        block_tables=tuple((first, tuple(blocks)) for first, blocks in tables),
        params=SamplingParams(),
        sample_seed=seed,
        position=start + len(token_ids),
    )


def check(chunks: list[ScheduledChunk], block_size: int) -> None:
    found = build_input(ScheduledBatch(chunks=tuple(chunks), block_copies=()), block_size, torch.device("cpu"))
    token_ids, positions, sample_rows = [], [], []
    for c in chunks:
        token_ids += c.token_ids
        positions += range(c.start, c.start + len(c.token_ids))
        if c.sample_seed is not None:
            sample_rows.append(len(token_ids) - 1)
    assert found.token_ids_T.tolist() == token_ids
    assert found.positions_T.tolist() == positions
    assert found.sample_rows_R.tolist() == sample_rows
    assert all(t.dtype == torch.int64 for t in (found.token_ids_T, found.positions_T, found.sample_rows_R))
    assert len(found.attention) == len(chunks[0].block_tables)
    for group, metadata in enumerate(found.attention):
        tables = [c.block_tables[group] for c in chunks]
        slots = []
        for c, (first, blocks) in zip(chunks, tables, strict=True):
            for position in range(c.start, c.start + len(c.token_ids)):
                slots.append(blocks[position // block_size - first] * block_size + position % block_size)
        assert metadata.slot_mapping_T.tolist() == slots
        assert metadata.query_lens_S.tolist() == [len(c.token_ids) for c in chunks]
        assert metadata.seq_lens_S.tolist() == [c.start + len(c.token_ids) for c in chunks]
        width = max(first + len(blocks) for first, blocks in tables)
        rows = [[*[0] * first, *blocks, *[0] * (width - first - len(blocks))] for first, blocks in tables]
        assert metadata.block_tables_SB.tolist() == rows
        arrays = (metadata.query_lens_S, metadata.seq_lens_S, metadata.block_tables_SB, metadata.slot_mapping_T)
        assert all(a.dtype == np.int32 for a in arrays)


def test_one_token() -> None:
    check([chunk([5], 0, (0, [3]))], 16)


def test_a_decode_at_block_edges() -> None:
    for start in (14, 15, 16, 17):
        check([chunk([5], start, (0, [9, 4]))], 16)


def test_a_chunk_over_several_blocks() -> None:
    check([chunk(range(100, 140), 7, (0, [9, 4, 0, 2]))], 16)


def test_chunks_that_do_not_sample() -> None:
    one, other = chunk([1, 2], 0, (0, [1]), seed=None), chunk([4, 5, 6], 0, (0, [5]), seed=None)
    check([one, chunk([3], 4, (0, [2])), other], 8)
    check([one], 8)


def test_a_seed_of_zero_samples() -> None:
    check([chunk([1], 0, (0, [1]), seed=0)], 8)


def test_blocks_that_left_a_window_are_0() -> None:
    check([chunk([5, 6], 31, (2, [9, 4, 7])), chunk([1], 3, (0, [8])), chunk([2], 16, (2, [3]))], 8)


def test_each_group_has_its_own_blocks() -> None:
    chunks = [
        chunk([5, 6, 7], 14, (0, [3, 4, 5, 6, 9]), (2, [1, 0, 2])),
        chunk([8], 4, (0, [7, 2]), (1, [4])),
    ]
    check(chunks, 4)


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
def test_random_batches(block_size: int, num_groups: int) -> None:
    rng = np.random.default_rng(block_size)
    for _ in range(20):
        chunks = []
        for _ in range(int(rng.integers(1, 12))):
            start, size = int(rng.choice([0, rng.integers(0, 200)])), int(rng.choice([1, rng.integers(1, 60)]))
            end = -(-(start + size) // block_size)
            tables: list[Table] = []
            for _ in range(num_groups):
                first = int(rng.integers(0, start // block_size + 1))
                tables.append((first, rng.integers(0, 10_000, end - first + int(rng.integers(0, 2))).tolist()))
            seed = None if rng.random() < 0.3 else int(rng.integers(2**32))
            chunks.append(chunk(rng.integers(0, 50_000, size).tolist(), start, *tables, seed=seed))
        check(chunks, block_size)
