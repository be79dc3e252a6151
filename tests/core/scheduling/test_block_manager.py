"""Allocation, reference counts, copy-on-write, prefix reuse: block by block."""

import itertools

import pytest

from fairlead.request import BlockTable, Request, SamplingParams, Sequence
from fairlead.scheduling.block_manager import BlockManager, CachedPrefix, CacheGroup, blocks_per_sequence

SIZE = 4
ids = itertools.count()


def sequence(num_tokens: int, *, salt: str = "", first_token: int = 0) -> Sequence:
    tokens = [first_token, *range(1, num_tokens)]
    request = Request(
        request_id=str(next(ids)), prompt_token_ids=tuple(tokens), params=SamplingParams(), cache_salt=salt
    )
    return new_sequence(next(ids), request, tokens)


def new_sequence(i: int, request: Request, tokens: list[int]) -> Sequence:
    return Sequence(seq_id=i, request=request, index=0, seed=0, key=(0.0, i), max_num_tokens=1000, token_ids=tokens)


def manager(num_blocks: int, *windows: int | None, caching: bool = True, max_chunk: int = 64) -> BlockManager:
    """So many blocks in each group; without windows, one group of full attention."""
    groups = [CacheGroup(num_blocks=num_blocks, sliding_window=window) for window in windows or (None,)]
    return BlockManager(groups, SIZE, max_chunk=max_chunk, enable_prefix_caching=caching)


def table(seq: Sequence, group: int = 0) -> list[int]:
    return seq.block_tables[group].blocks


def tables(seq: Sequence) -> list[tuple[int, int]]:
    """Number of the first block, and number of blocks, by group."""
    return [(t.first, len(t.blocks)) for t in seq.block_tables]


def hits(blocks: BlockManager, seq: Sequence, group: int = 0) -> list[int]:
    return blocks.cached_prefix(seq).tables[group].blocks


def admit(blocks: BlockManager, seq: Sequence) -> CachedPrefix:
    prefix = blocks.cached_prefix(seq)
    blocks.attach(seq, prefix)
    return prefix


def compute(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> list[tuple[int, int, int]] | None:
    """Reserves and counts as computed, as a step would; all tokens unless told. A new sequence hits nothing."""
    if not seq.block_tables:
        seq.block_tables = [BlockTable() for _ in blocks.groups]
    num_tokens = seq.num_tokens - seq.num_computed_tokens if num_tokens is None else num_tokens
    if not blocks.reserve(seq, num_tokens):
        return None
    seq.num_computed_tokens += num_tokens
    return [(c.group, c.source, c.destination) for c in blocks.take_copies()]


def fork(blocks: BlockManager, parent: Sequence) -> Sequence:
    """A child that has its last prompt token to compute."""
    child = new_sequence(next(ids), parent.request, list(parent.token_ids))
    blocks.fork(parent, child, num_tokens=parent.num_tokens - 1)
    return child


@pytest.mark.parametrize("num_tokens", range(1, 3 * SIZE + 2))
def test_a_sequence_takes_as_many_blocks_as_its_tokens_need(num_tokens: int) -> None:
    blocks, seq = manager(10), sequence(num_tokens)
    assert compute(blocks, seq) == []
    assert len(table(seq)) == len(set(table(seq))) == -(-num_tokens // SIZE) == blocks.pools[0].num_referenced
    assert blocks.pools[0].num_available == 10 - blocks.pools[0].num_referenced
    blocks.check_integrity([seq])
    blocks.free(seq)
    assert (seq.block_tables, seq.num_computed_tokens, blocks.pools[0].num_referenced) == ([], 0, 0)
    blocks.check_integrity([])


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 7])
def test_chunks_take_no_more_than_the_whole(chunk: int) -> None:
    blocks, seq = manager(10), sequence(18)
    while seq.num_computed_tokens < 18:
        assert compute(blocks, seq, min(chunk, 18 - seq.num_computed_tokens)) == []
        assert len(table(seq)) == -(-seq.num_computed_tokens // SIZE)


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    blocks, seq, other = manager(3), sequence(SIZE), sequence(2 * SIZE + 1, first_token=9)
    compute(blocks, seq)
    assert compute(blocks, other) is None
    assert table(other) == []
    assert blocks.pools[0].num_available == 2
    blocks.check_integrity([seq, other])
    assert blocks.reserve(other, 2 * SIZE)  # the last two blocks


@pytest.mark.parametrize(
    ("num_tokens", "num_hits"),
    [(1, 0), (SIZE - 1, 0), (SIZE, 0), (SIZE + 1, 1), (2 * SIZE, 1), (2 * SIZE + 1, 2), (5 * SIZE, 3)],
)
def test_a_cached_prefix_leaves_at_least_the_last_token(num_tokens: int, num_hits: int) -> None:
    blocks, first, second = manager(20), sequence(3 * SIZE + 2), sequence(num_tokens)
    compute(blocks, first)
    prefix = admit(blocks, second)
    assert (prefix.num_blocks, table(second)) == (num_hits, table(first)[:num_hits])
    assert second.num_computed_tokens == num_hits * SIZE
    assert compute(blocks, second) == []
    blocks.check_integrity([first, second])
    blocks.free(first)
    blocks.check_integrity([second])


def test_a_prefix_ends_at_its_first_missing_block() -> None:
    blocks, first, again = manager(4), sequence(3 * SIZE), sequence(3 * SIZE + 1)
    compute(blocks, first)
    blocks.pools[0].forget(first.block_hashes[1])
    assert hits(blocks, again) == table(first)[:1]


def test_salts_share_nothing() -> None:
    blocks, first = manager(20), sequence(9)
    compute(blocks, first)
    assert hits(blocks, sequence(9, salt="tenant")) == []
    assert hits(blocks, sequence(9, first_token=7)) == []
    assert hits(blocks, sequence(9)) == table(first)[:2]


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    blocks, first = manager(3, caching=False), sequence(9)
    compute(blocks, first)
    again = sequence(9)
    assert hits(blocks, again) == []
    assert first.block_hashes == again.block_hashes == []
    blocks.free(first)
    assert len(blocks.pools[0]._free) == 3


def test_freed_prefixes_stay_available_and_are_found_again() -> None:
    blocks, first, again = manager(3), sequence(9), sequence(9)
    compute(blocks, first)
    held = table(first)
    blocks.free(first)
    assert (blocks.pools[0].num_available, blocks.pools[0].num_referenced) == (3, 0)
    assert blocks.can_admit(again, blocks.cached_prefix(again))
    admit(blocks, again)
    assert table(again) == held[:2]
    assert blocks.pools[0].num_available == 1
    assert compute(blocks, again) == []
    blocks.check_integrity([again])


def test_admission_counts_an_idle_hit_once() -> None:
    blocks, first, other = manager(3), sequence(9), sequence(SIZE, first_token=9)
    compute(blocks, first)
    blocks.free(first)
    compute(blocks, other)  # takes the block that held no whole prefix
    longer = sequence(9)
    cached = blocks.cached_prefix(longer)
    assert cached.num_blocks == 2
    assert not blocks.can_admit(longer, cached)  # two idle hits and one more, of which there is none
    blocks.free(other)
    assert blocks.can_admit(longer, cached)


def test_admission_takes_nothing_off_for_a_hit_that_is_held() -> None:
    blocks, first, again = manager(4), sequence(9), sequence(9)
    compute(blocks, first)
    prefix = blocks.cached_prefix(again)
    assert prefix.num_blocks == 2
    assert blocks.can_admit(again, prefix)  # one more block, and there is one
    compute(blocks, sequence(1, first_token=9))
    assert not blocks.can_admit(again, prefix)


def test_free_blocks_are_used_before_cached_ones_are_evicted() -> None:
    blocks, first, other = manager(4), sequence(2 * SIZE), sequence(2 * SIZE, first_token=9)
    compute(blocks, first)
    blocks.free(first)
    compute(blocks, other)
    assert len(hits(blocks, sequence(2 * SIZE + 1))) == 2


def test_the_end_of_the_least_recently_used_prefix_is_evicted_first() -> None:
    blocks, old, new = manager(4), sequence(2 * SIZE), sequence(2 * SIZE, first_token=9)
    for seq in (new, old):
        compute(blocks, seq)
        blocks.free(seq)
    blocks.attach(new, blocks.cached_prefix(sequence(2 * SIZE + 1, first_token=9)))
    blocks.free(new)  # used last
    left = []
    for first_token in (20, 21, 22, 23):
        compute(blocks, sequence(1, first_token=first_token))
        left.append([len(hits(blocks, sequence(2 * SIZE + 1, first_token=token))) for token in (0, 9)])
    assert left == [[1, 2], [0, 2], [0, 1], [0, 0]]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_tokens", [2 * SIZE - 1, 2 * SIZE, 2 * SIZE + 1])
def test_forks_share_the_prompt_and_copy_before_they_write(num_tokens: int, caching: bool) -> None:
    blocks, parent = manager(10, caching=caching), sequence(num_tokens)
    compute(blocks, parent)
    children = [fork(blocks, parent) for _ in range(2)]
    family = [parent, *children]
    shared = table(parent)[: -(-(num_tokens - 1) // SIZE)]
    assert all(table(c) == shared for c in children)
    assert blocks.pools[0].num_referenced == len(table(parent))
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
            (0, last, table(parent)[1]),
            (0, last, table(children[0])[1]),
        ],  # the last owner needs none
        2 * SIZE: [(0, last, table(c)[1]) for c in children],  # the parent has gone on to a new block
        2 * SIZE + 1: [],  # each begins a block
    }
    assert copies == expected[num_tokens]
    assert len({table(seq)[(num_tokens - 1) // SIZE] for seq in family}) == 3  # where they have begun to differ
    assert len({tuple(table(seq)[: (num_tokens - 1) // SIZE]) for seq in family}) == 1
    blocks.check_integrity(family)


def test_a_cached_block_is_copied_even_by_its_only_owner() -> None:
    blocks, parent = manager(2), sequence(SIZE)
    compute(blocks, parent)
    child = fork(blocks, parent)
    blocks.free(parent)
    source = table(child)[0]
    assert compute(blocks, child) == [(0, source, table(child)[0])]
    assert hits(blocks, sequence(SIZE + 1)) == [source]
    blocks.check_integrity([child])


def test_a_copy_needs_a_block() -> None:
    blocks, parent = manager(1), sequence(SIZE - 1)
    compute(blocks, parent)
    child = fork(blocks, parent)
    assert not blocks.reserve(child, 1)
    assert table(child) == table(parent)
    blocks.free(parent)
    assert compute(blocks, child, 1) == []


def test_unpublished_blocks_are_not_found_and_go_free() -> None:
    blocks, seq = manager(3), sequence(9)
    compute(blocks, seq)
    blocks.unpublish(seq)
    assert hits(blocks, sequence(9)) == []
    blocks.check_integrity([seq])
    blocks.free(seq)
    assert len(blocks.pools[0]._free) == 3


def test_a_reset_forgets_prefixes_and_leaves_sequences_alone() -> None:
    blocks, running, done = manager(6, None, 100), sequence(9), sequence(9, first_token=9)
    compute(blocks, running)
    compute(blocks, done)
    blocks.free(done)
    held = list(table(running))
    blocks.reset_cache()
    assert not any(pool.cache.hashes for pool in blocks.pools)
    assert table(running) == held
    assert hits(blocks, sequence(9)) == hits(blocks, sequence(9, first_token=9)) == []
    assert (len(blocks.pools[0]._free), blocks.pools[0].num_available) == (3, 3)
    blocks.check_integrity([running])
    running.token_ids += [5, 6, 7]
    compute(blocks, running)  # fills its third block, which is published behind blocks that are not
    blocks.free(running)
    assert blocks.pools[0].num_available == 6
    blocks.check_integrity([])


# Sliding windows, and several groups


@pytest.mark.parametrize(
    ("window", "position", "first"), [(None, 9, 0), (1, 0, 0), (1, 9, 9), (4, 2, 0), (4, 3, 0), (4, 4, 1), (4, 9, 6)]
)
def test_a_query_sees_itself_and_the_window_before_it(window: int | None, position: int, first: int) -> None:
    assert CacheGroup(num_blocks=1, sliding_window=window).first_visible(position) == first


@pytest.mark.parametrize("max_chunk", [1, 2, 3, 4, 5, 9, 100])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5, 6, 8, 9, 100])
def test_a_sequence_never_holds_more_than_blocks_per_sequence(window: int | None, max_chunk: int) -> None:
    """However its chunks fall; and the bound is not more than a block above what it may hold."""
    num_tokens = 40
    bound, most = blocks_per_sequence(window, num_tokens, SIZE, max_chunk), 0
    for first_chunk in range(1, max_chunk + 1):
        blocks, seq = manager(bound, window, max_chunk=max_chunk), sequence(num_tokens)
        for size in itertools.chain([first_chunk], itertools.repeat(max_chunk)):
            assert compute(blocks, seq, min(size, num_tokens - seq.num_computed_tokens)) == []
            most = max(most, len(table(seq)))
            if seq.num_computed_tokens == num_tokens:
                break
    assert bound - (window is not None) <= most <= bound


@pytest.mark.parametrize("window", [1, 3, SIZE, SIZE + 1, 2 * SIZE + 3])
def test_blocks_are_released_once_no_later_token_sees_them(window: int) -> None:
    blocks, seq = manager(20, window, None), sequence(30)
    for position in range(30):
        compute(blocks, seq, 1)
        first = max(0, position - window + 1) // SIZE
        end = position // SIZE + 1
        assert tables(seq) == [(first, end - first), (0, end)]
        assert blocks.usage == max(len(t.blocks) for t in seq.block_tables) / 20
        blocks.check_integrity([seq])
    blocks.free(seq)
    assert blocks.usage == 0


def test_a_chunk_keeps_what_its_first_token_sees() -> None:
    blocks, seq = manager(20, 3), sequence(30)
    held = []
    for size in (7, 9, 1, 13):
        compute(blocks, seq, size)
        held += tables(seq)
    assert held == [(0, 2), (1, 3), (3, 2), (3, 5)]  # 5 is the first token that token 7 sees, 14 and 15 those of 16, 17


@pytest.mark.parametrize(("num_blocks", "lacking"), [((3, 9), 0), ((9, 3), 1)])
def test_a_reservation_needs_blocks_in_every_group(num_blocks: tuple[int, int], lacking: int) -> None:
    groups = [CacheGroup(num_blocks=n, sliding_window=w) for n, w in zip(num_blocks, (None, 32), strict=True)]
    blocks, seq = BlockManager(groups, SIZE, max_chunk=64, enable_prefix_caching=True), sequence(16)
    assert not blocks.can_admit(seq, blocks.cached_prefix(seq))
    assert compute(blocks, seq, 13) is None
    assert tables(seq) == [(0, 0), (0, 0)]
    assert compute(blocks, seq, 12) == []
    assert compute(blocks, seq) is None
    assert blocks.pools[lacking].num_available == 0
    assert tables(seq) == [(0, 3), (0, 3)]
    blocks.check_integrity([seq])


def test_a_refused_reservation_still_gives_up_what_left_the_window() -> None:
    blocks, seq, other = manager(4, 1), sequence(12), sequence(8, first_token=9)
    compute(blocks, seq, 8)
    compute(blocks, other)
    assert compute(blocks, sequence(1, first_token=20)) is None
    assert compute(blocks, seq, 4) == []
    assert tables(seq) == [(2, 1)]
    assert tables(other) == [(0, 2)]
    assert compute(blocks, other, 0) == []  # as in a later step
    assert tables(other) == [(2, 0)]
    blocks.check_integrity([seq, other])


def test_admission_counts_only_what_a_window_needs() -> None:
    blocks, seq = manager(4, 4, max_chunk=8), sequence(100)
    assert blocks.can_admit(seq, blocks.cached_prefix(seq))  # 3 + 8 tokens at a time span at most 4 blocks
    assert not manager(3, 4, max_chunk=8).can_admit(seq, blocks.cached_prefix(seq))
    assert manager(3, 4, max_chunk=8).can_admit(sequence(12), blocks.cached_prefix(seq))
    assert not manager(4, 4, None, max_chunk=8).can_admit(seq, manager(4, 4, None).cached_prefix(seq))


def test_admission_counts_only_what_a_window_needs_behind_a_hit() -> None:
    blocks, old, new = manager(3, 4), sequence(20), sequence(21)
    for _ in range(5):
        compute(blocks, old, 4)
    blocks.free(old)
    prefix = blocks.cached_prefix(new)
    assert (prefix.num_blocks, prefix.tables[0].first) == (5, 4)
    compute(blocks, sequence(1, first_token=9))
    assert blocks.can_admit(new, prefix)  # takes the hit and the other block that is left


@pytest.mark.parametrize(("window", "first"), [(1, 3), (2, 2), (5, 2), (6, 1), (9, 1), (10, 0), (100, 0)])
def test_a_hit_needs_only_the_windows_blocks(window: int, first: int) -> None:
    blocks, old, new = manager(20, None, window), sequence(3 * SIZE + 1), sequence(3 * SIZE + 1)
    compute(blocks, old)
    for its_hash in old.block_hashes[:first]:
        blocks.pools[1].forget(its_hash)
    prefix = admit(blocks, new)
    assert prefix.num_blocks == 3
    assert tables(new) == [(0, 3), (first, 3 - first)]
    assert [t.blocks for t in new.block_tables] == [table(old)[:3], table(old, 1)[first:3]]
    assert new.num_computed_tokens == 3 * SIZE
    assert compute(blocks, new) == []
    blocks.check_integrity([old, new])


@pytest.mark.parametrize(
    ("gone", "num_hits"),
    [
        ([], 5),
        ([(0, 4)], 4),
        ([(0, 3)], 3),
        ([(0, 0)], 0),
        ([(1, 4)], 4),
        ([(1, 0), (1, 1), (1, 2), (1, 3)], 5),
        ([(0, 4), (1, 3)], 3),
        ([(1, 1), (1, 2), (1, 3), (1, 4)], 1),
    ],
    ids=str,
)
def test_a_hit_ends_where_a_group_lacks_what_it_would_see(gone: list[tuple[int, int]], num_hits: int) -> None:
    """At a block's edge the window of 5 tokens sees into one block before it."""
    blocks, old, new = manager(20, None, SIZE + 1), sequence(5 * SIZE), sequence(5 * SIZE + 1)
    compute(blocks, old)
    for group, number in gone:
        blocks.pools[group].forget(old.block_hashes[number])
    assert blocks.cached_prefix(new).num_blocks == num_hits


def test_blocks_that_left_a_window_can_be_hit_until_they_are_evicted() -> None:
    blocks, old = manager(4, SIZE), sequence(5 * SIZE)
    compute(blocks, old, 2 * SIZE)
    compute(blocks, old, SIZE)
    assert tables(old) == [(1, 2)]
    assert admit(blocks, sequence(SIZE + 1)).num_blocks == 1


def test_a_group_copies_in_itself() -> None:
    """The window's blocks have other numbers than those of full attention."""
    blocks, parent = manager(20, None, 3), sequence(10)
    compute(blocks, parent, 9)
    compute(blocks, parent)
    child = fork(blocks, parent)
    assert tables(child) == [(0, 3), (1, 2)]
    sources = [table(child)[2], table(child, 1)[1]]
    copies = compute(blocks, child)
    assert copies == [(0, sources[0], table(child)[2]), (1, sources[1], table(child, 1)[1])]
    assert [t.blocks[-1] for t in parent.block_tables] == sources
    blocks.check_integrity([parent, child])


def test_a_fork_at_a_blocks_edge_leaves_out_the_last_block() -> None:
    """Its own first token goes there."""
    blocks, parent = manager(20, 3, None), sequence(2 * SIZE + 1)
    for _ in range(2 * SIZE + 1):
        compute(blocks, parent, 1)
    assert tables(parent) == [(1, 2), (0, 3)]
    child = fork(blocks, parent)
    assert tables(child) == [(1, 1), (0, 2)]
    assert compute(blocks, child) == []
    assert tables(child) == tables(parent)
    blocks.check_integrity([parent, child])


def test_only_the_group_whose_block_is_shared_copies() -> None:
    """The twin's block of the window is its own, since the cache kept the first one's."""
    blocks, parent = manager(20, None, 3), sequence(SIZE)
    compute(blocks, parent)
    blocks.pools[1].forget(parent.block_hashes[0])
    child = fork(blocks, parent)
    blocks.free(parent)
    source = table(child)[0]
    assert compute(blocks, child) == [(0, source, table(child)[0])]
    blocks.check_integrity([child])


def test_a_copy_in_a_window_needs_a_block_beside_its_own() -> None:
    """Why blocks_per_sequence is a block more than chunks of one token hold."""
    num_blocks = blocks_per_sequence(SIZE + 1, 100, SIZE, 1)
    blocks, parent = manager(num_blocks, SIZE + 1, max_chunk=1), sequence(3 * SIZE)
    for _ in range(3 * SIZE):
        compute(blocks, parent, 1)
    child = fork(blocks, parent)
    blocks.free(parent)
    copies = compute(blocks, child)
    assert copies is not None
    assert len(copies) == 1


def test_what_left_the_window_of_a_sequence_with_nan_is_not_found() -> None:
    blocks, bad, again = manager(20, None, 3), sequence(20), sequence(20)
    for _ in range(5):
        compute(blocks, bad, 4)
    assert tables(bad) == [(0, 5), (3, 2)]
    held = blocks.pools[1].num_referenced
    blocks.unpublish(bad)
    assert blocks.pools[1].num_referenced == held
    assert not any(pool.cache.hashes for pool in blocks.pools)
    blocks.check_integrity([bad])
    blocks.free(bad)
    assert blocks.cached_prefix(again).num_blocks == 0
    assert [pool.num_available for pool in blocks.pools] == [20, 20]
    blocks.check_integrity([])


def test_check_integrity_wants_a_table_per_group() -> None:
    blocks, seq = manager(5, None, 3), sequence(9)
    compute(blocks, seq)
    blocks.check_integrity([seq, sequence(3)])  # one that waits has none
    seq.block_tables.pop()
    with pytest.raises(AssertionError):
        blocks.check_integrity([seq])
