"""Allocation, reference counts, copy-on-write, prefix reuse: block by block."""

import itertools
from collections.abc import Callable

import pytest

from fairlead.request import Request, SamplingParams, Sequence
from fairlead.scheduling.block_manager import BlockManager

SIZE = 4
ids = itertools.count()


def sequence(num_tokens: int, *, salt: str = "", first_token: int = 0) -> Sequence:
    tokens = [first_token, *range(1, num_tokens)]
    request = Request(
        request_id=str(next(ids)), prompt_token_ids=tuple(tokens), params=SamplingParams(), cache_salt=salt
    )
    return Sequence(seq_id=next(ids), request=request, index=0, seed=0, token_ids=tokens)


def pool(num_blocks: int, *, caching: bool = True) -> BlockManager:
    return BlockManager(num_blocks, SIZE, enable_prefix_caching=caching)


def compute(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> list[tuple[int, int]] | None:
    """Reserves and counts as computed, as a step would; all tokens unless told."""
    num_tokens = seq.num_tokens - seq.num_computed_tokens if num_tokens is None else num_tokens
    copies = blocks.reserve(seq, num_tokens)
    if copies is not None:
        seq.num_computed_tokens += num_tokens
    return copies


def fork(blocks: BlockManager, parent: Sequence) -> Sequence:
    """A child that has its last prompt token to compute."""
    child = Sequence(
        seq_id=next(ids),
        request=parent.request,
        index=1,
        seed=1,
        token_ids=list(parent.token_ids),
        num_computed_tokens=parent.num_tokens - 1,
    )
    blocks.fork(parent, child)
    return child


@pytest.mark.parametrize("num_tokens", range(1, 3 * SIZE + 2))
def test_a_sequence_takes_as_many_blocks_as_its_tokens_need(num_tokens: int) -> None:
    blocks, seq = pool(10), sequence(num_tokens)
    assert compute(blocks, seq) == []
    assert len(seq.block_table) == len(set(seq.block_table)) == -(-num_tokens // SIZE) == blocks.num_referenced
    assert blocks.num_available == 10 - blocks.num_referenced
    blocks.check_integrity([seq])
    blocks.free(seq)
    assert (seq.block_table, seq.num_computed_tokens, blocks.num_referenced) == ([], 0, 0)
    blocks.check_integrity([])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
def test_chunks_take_no_more_than_the_whole(chunk: int) -> None:
    blocks, seq = pool(10), sequence(18)
    while seq.num_computed_tokens < 18:
        assert compute(blocks, seq, min(chunk, 18 - seq.num_computed_tokens)) == []
        assert len(seq.block_table) == -(-seq.num_computed_tokens // SIZE)


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    blocks, seq, other = pool(3), sequence(SIZE), sequence(2 * SIZE + 1, first_token=9)
    compute(blocks, seq)
    assert blocks.reserve(other, 2 * SIZE + 1) is None
    assert other.block_table == []
    assert blocks.num_available == 2
    blocks.check_integrity([seq, other])
    assert blocks.reserve(other, 2 * SIZE) == []  # the last two blocks


@pytest.mark.parametrize(
    ("num_tokens", "num_hits"),
    [(1, 0), (SIZE - 1, 0), (SIZE, 0), (SIZE + 1, 1), (2 * SIZE, 1), (2 * SIZE + 1, 2), (5 * SIZE, 3)],
)
def test_a_cached_prefix_leaves_at_least_the_last_token(num_tokens: int, num_hits: int) -> None:
    blocks, first, second = pool(20), sequence(3 * SIZE + 2), sequence(num_tokens)
    compute(blocks, first)
    cached = blocks.cached_prefix(second)
    assert cached == first.block_table[:num_hits]
    blocks.attach(second, cached)
    assert second.num_computed_tokens == num_hits * SIZE
    assert compute(blocks, second) == []
    blocks.check_integrity([first, second])
    blocks.free(first)
    blocks.check_integrity([second])


def test_a_prefix_ends_at_its_first_missing_block() -> None:
    blocks, first, again = pool(4), sequence(3 * SIZE), sequence(3 * SIZE + 1)
    compute(blocks, first)
    blocks._cache.forget(first.block_table[1])
    assert blocks.cached_prefix(again) == first.block_table[:1]


def test_salts_share_nothing() -> None:
    blocks, first = pool(20), sequence(9)
    compute(blocks, first)
    assert blocks.cached_prefix(sequence(9, salt="tenant")) == []
    assert blocks.cached_prefix(sequence(9, first_token=7)) == []
    assert blocks.cached_prefix(sequence(9)) == first.block_table[:2]


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    blocks, first = pool(3, caching=False), sequence(9)
    compute(blocks, first)
    assert blocks.cached_prefix(sequence(9)) == []
    assert first.block_hashes == []
    blocks.free(first)
    assert len(blocks._free) == 3


def test_freed_prefixes_stay_available_and_are_found_again() -> None:
    blocks, first, again = pool(3), sequence(9), sequence(9)
    compute(blocks, first)
    table = first.block_table
    blocks.free(first)
    assert (blocks.num_available, blocks.num_referenced) == (3, 0)
    cached = blocks.cached_prefix(again)
    assert cached == table[:2]
    assert blocks.can_admit(again, cached)
    blocks.attach(again, cached)
    assert blocks.num_available == 1
    assert compute(blocks, again) == []
    blocks.check_integrity([again])


def test_admission_counts_an_idle_hit_once() -> None:
    blocks, first, other = pool(3), sequence(9), sequence(SIZE, first_token=9)
    compute(blocks, first)
    blocks.free(first)
    compute(blocks, other)  # takes the block that held no whole prefix
    longer = sequence(9)
    cached = blocks.cached_prefix(longer)
    assert len(cached) == 2
    assert not blocks.can_admit(longer, cached)  # two idle hits and one more, of which there is none
    blocks.free(other)
    assert blocks.can_admit(longer, cached)


def test_free_blocks_are_used_before_cached_ones_are_evicted() -> None:
    blocks, first, other = pool(4), sequence(2 * SIZE), sequence(2 * SIZE, first_token=9)
    compute(blocks, first)
    blocks.free(first)
    compute(blocks, other)
    assert len(blocks.cached_prefix(sequence(2 * SIZE + 1))) == 2


def test_the_end_of_the_least_recently_used_prefix_is_evicted_first() -> None:
    blocks, old, new = pool(4), sequence(2 * SIZE), sequence(2 * SIZE, first_token=9)
    for seq in (new, old):
        compute(blocks, seq)
        blocks.free(seq)
    blocks.attach(new, blocks.cached_prefix(sequence(2 * SIZE + 1, first_token=9)))
    blocks.free(new)  # used last
    left = []
    for first_token in (20, 21, 22, 23):
        compute(blocks, sequence(1, first_token=first_token))
        left.append([len(blocks.cached_prefix(sequence(2 * SIZE + 1, first_token=token))) for token in (0, 9)])
    assert left == [[1, 2], [0, 2], [0, 1], [0, 0]]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_tokens", [2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1])
def test_forks_share_the_prompt_and_copy_before_they_write(num_tokens: int, caching: bool) -> None:
    blocks, parent = pool(10, caching=caching), sequence(num_tokens)
    compute(blocks, parent)
    children = [fork(blocks, parent) for _ in range(2)]
    family = [parent, *children]
    shared = parent.block_table[: -(-(num_tokens - 1) // SIZE)]
    assert all(c.block_table == shared for c in children)
    assert blocks.num_referenced == len(parent.block_table)
    blocks.check_integrity(family)

    parent.token_ids.append(100)
    copies = []
    for seq in family:
        made = compute(blocks, seq)
        assert made is not None
        copies += made
    last = shared[-1]
    expected = {
        2 * SIZE - 1: [
            (last, parent.block_table[1]),
            (last, children[0].block_table[1]),
        ],  # the last owner needs none
        2 * SIZE: [(last, c.block_table[1]) for c in children],  # the parent has gone on to a new block
        2 * SIZE + 1: [],  # each begins a block
    }
    assert copies == expected[num_tokens]
    tables = [seq.block_table for seq in family]
    assert len({table[(num_tokens - 1) // SIZE] for table in tables}) == 3  # where they have begun to differ
    assert len({tuple(table[: (num_tokens - 1) // SIZE]) for table in tables}) == 1
    blocks.check_integrity(family)


def test_a_cached_block_is_copied_even_by_its_only_owner() -> None:
    blocks, parent = pool(2), sequence(SIZE)
    compute(blocks, parent)
    child = fork(blocks, parent)
    blocks.free(parent)
    source = child.block_table[0]
    assert compute(blocks, child) == [(source, child.block_table[0])]
    assert blocks.cached_prefix(sequence(SIZE + 1)) == [source]
    blocks.check_integrity([child])


def test_a_copy_needs_a_block() -> None:
    blocks, parent = pool(1), sequence(SIZE - 1)
    compute(blocks, parent)
    child = fork(blocks, parent)
    assert blocks.reserve(child, 1) is None
    assert child.block_table == parent.block_table
    blocks.free(parent)
    assert blocks.reserve(child, 1) == []


def test_unpublished_blocks_are_not_found_and_go_free() -> None:
    blocks, seq = pool(3), sequence(9)
    compute(blocks, seq)
    blocks.unpublish(seq)
    assert blocks.cached_prefix(sequence(9)) == []
    blocks.check_integrity([seq])
    blocks.free(seq)
    assert len(blocks._free) == 3


def test_a_reset_forgets_prefixes_and_leaves_sequences_alone() -> None:
    blocks, running, done = pool(6), sequence(9), sequence(9, first_token=9)
    compute(blocks, running)
    compute(blocks, done)
    blocks.free(done)
    table = list(running.block_table)
    blocks.reset_cache()
    assert running.block_table == table
    assert blocks.cached_prefix(sequence(9)) == blocks.cached_prefix(sequence(9, first_token=9)) == []
    assert (len(blocks._free), blocks.num_available) == (3, 3)
    blocks.check_integrity([running])
    running.token_ids += [5, 6, 7]
    compute(blocks, running)  # fills its third block, which is published behind blocks that are not
    blocks.free(running)
    assert blocks.num_available == 6
    blocks.check_integrity([])


def _lose(blocks: BlockManager) -> None:
    blocks._free.pop()


def _free_twice(blocks: BlockManager) -> None:
    blocks._free.append(blocks._free[0])


def _free_a_used_one(blocks: BlockManager) -> None:
    blocks._free.append(next(b for b in range(blocks.num_blocks) if blocks._refs[b]))


def _miscount(blocks: BlockManager) -> None:
    blocks._refs[blocks._free[0]] += 1


@pytest.mark.parametrize("damage", [_lose, _free_twice, _free_a_used_one, _miscount])
def test_check_integrity_notices(damage: Callable[[BlockManager], None]) -> None:
    blocks, seq = pool(5), sequence(9)
    compute(blocks, seq)
    blocks.check_integrity([seq])
    damage(blocks)
    with pytest.raises(AssertionError):
        blocks.check_integrity([seq])
