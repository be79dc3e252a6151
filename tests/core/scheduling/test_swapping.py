"""Blocks that are evicted to the host and come back: which copies, in which order."""

import itertools

import pytest

from fairlead.request import Request, SamplingParams, Sequence
from fairlead.scheduling.batch import BlockCopy, CopyKind
from fairlead.scheduling.block_manager import BlockManager, CacheGroup
from fairlead.scheduling.host_tier import SwapCosts

SIZE = 4
FREE = SwapCosts(out_s=(0.0,), in_s=(0.0,), overhead_s=0.0, token_s=1.0)
numbers = itertools.count()


def sequence(num_tokens: int, *, first_token: int = 0, n: int = 1, prompt_logprobs: int | None = None) -> Sequence:
    tokens, number = [first_token, *range(1, num_tokens)], next(numbers)
    params = SamplingParams(n=n, prompt_logprobs=prompt_logprobs)
    request = Request(request_id=str(number), prompt_token_ids=tuple(tokens), params=params)
    return make(request, number * 1000, tokens)


def make(request: Request, seq_id: int, token_ids: list[int], index: int = 0) -> Sequence:
    key = (0.0, seq_id)
    return Sequence(
        seq_id=seq_id, request=request, index=index, seed=0, key=key, max_num_tokens=1000, token_ids=token_ids
    )


def manager(
    num_blocks: int,
    num_host_blocks: int,
    *windows: int | None,
    costs: SwapCosts | None = FREE,
    caching: bool = True,
) -> BlockManager:
    windows = windows or (None,)
    groups = [CacheGroup(num_blocks=num_blocks, sliding_window=w, num_host_blocks=num_host_blocks) for w in windows]
    if costs is FREE:
        zeros = (0.0,) * len(windows)
        costs = SwapCosts(out_s=zeros, in_s=zeros, overhead_s=0.0, token_s=1.0)
    return BlockManager(groups, SIZE, max_chunk=64, enable_prefix_caching=caching, swap_costs=costs)


def copy(kind: CopyKind, source: int, destination: int, group: int = 0) -> BlockCopy:
    return BlockCopy(kind=kind, group=group, source=source, destination=destination)


def run(blocks: BlockManager, seq: Sequence, num_tokens: int | None = None) -> tuple[BlockCopy, ...]:
    """Admits a sequence if it has no blocks, and computes its tokens, all unless told; the copies that this takes."""
    if not seq.block_tables:
        prefix = blocks.cached_prefix(seq)
        assert blocks.can_admit(seq, prefix)
        blocks.attach(seq, prefix)
    num_tokens = seq.num_tokens - seq.num_computed_tokens if num_tokens is None else num_tokens
    assert blocks.reserve(seq, num_tokens)
    seq.num_computed_tokens += num_tokens
    blocks.check_integrity([seq])
    return blocks.take_copies()


def push_out(blocks: BlockManager, num_tokens: int, first_token: int = 50) -> tuple[BlockCopy, ...]:
    """Another sequence comes, takes blocks and goes."""
    other = sequence(num_tokens, first_token=first_token)
    copies = run(blocks, other)
    blocks.free(other)
    return copies


def test_a_preempted_sequence_gets_its_full_blocks_back() -> None:
    blocks, seq = manager(4, 8), sequence(3 * SIZE + 2)
    assert run(blocks, seq) == ()
    blocks.free(seq)
    # The last block was not full: it is free. The others are idle, and the last of them goes first.
    assert push_out(blocks, 4 * SIZE) == (
        copy(CopyKind.OUT, 2, 0),
        copy(CopyKind.OUT, 1, 1),
        copy(CopyKind.OUT, 0, 2),
    )
    seq.token_ids.append(99)
    prefix = blocks.cached_prefix(seq)
    assert (prefix.num_blocks, prefix.tables[0].blocks, prefix.swapped) == (3, [], ((0, 1, 2),))
    copies = run(blocks, seq)
    # Each block is pushed out before it is overwritten.
    assert [c.kind for c in copies] == [CopyKind.OUT, CopyKind.IN] * 3 + [CopyKind.OUT]
    brought = [c for c in copies if c.kind is CopyKind.IN]
    assert [c.source for c in brought] == [2, 1, 0]
    assert [c.destination for c in brought] == seq.block_tables[0].blocks[:3]
    assert (blocks.num_swapped_out, blocks.num_swapped_in) == (7, 3)


def test_what_the_host_has_is_not_copied_out_again() -> None:
    blocks, seq = manager(3, 8), sequence(2 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    assert len(push_out(blocks, 3 * SIZE)) == 2
    run(blocks, seq)
    blocks.free(seq)
    assert [c.kind for c in push_out(blocks, 3 * SIZE)] == [CopyKind.IN] * 2  # its own prefix, in place of the other's
    assert (blocks.num_swapped_out, blocks.num_swapped_in) == (5, 4)


def test_a_prefix_may_lie_on_both() -> None:
    blocks, seq = manager(4, 8), sequence(3 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    assert push_out(blocks, 2 * SIZE - 1) == (copy(CopyKind.OUT, 2, 0),)
    again = sequence(3 * SIZE + 1)
    prefix = blocks.cached_prefix(again)
    assert (prefix.num_blocks, prefix.tables[0].blocks, prefix.swapped) == (3, [0, 1], ((2,),))
    assert run(blocks, again) == (copy(CopyKind.IN, 0, 2), copy(CopyKind.OUT, 3, 1))
    assert again.block_tables[0].blocks[:3] == [0, 1, 2]


def test_a_block_that_is_missing_amid_the_device_comes_from_the_host() -> None:
    blocks, seq = manager(4, 8), sequence(3 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 4 * SIZE)
    blocks.pools[0].reset_cache()
    first = sequence(SIZE)
    run(blocks, first)
    prefix = blocks.cached_prefix(seq)
    assert (prefix.num_blocks, len(prefix.tables[0].blocks), prefix.swapped) == (3, 1, ((1, 2),))
    held = first.block_tables[0].blocks[0]
    blocks.attach(seq, prefix)
    assert seq.block_tables[0].blocks[0] == held
    assert len(set(seq.block_tables[0].blocks)) == 3
    blocks.check_integrity([first, seq])


def test_a_host_block_that_comes_back_is_not_overwritten_before() -> None:
    """Both host blocks are wanted; what the sequence pushes out finds no room there."""
    blocks, seq = manager(3, 2), sequence(2 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 3 * SIZE - 1)
    assert set(blocks.tiers[0].blocks) == set(seq.block_hashes)
    copies = run(blocks, seq)
    assert [c for c in copies if c.kind is CopyKind.IN] == [
        copy(CopyKind.IN, 1, seq.block_tables[0].blocks[0]),
        copy(CopyKind.IN, 0, seq.block_tables[0].blocks[1]),
    ]
    first_in = next(i for i, c in enumerate(copies) if c.kind is CopyKind.IN)
    assert all(c.kind is CopyKind.IN for c in copies[first_in : first_in + 2])


def test_the_least_recently_used_host_block_gives_way() -> None:
    blocks, old, new = manager(1, 1), sequence(SIZE), sequence(SIZE, first_token=9)
    for seq in (old, new):
        run(blocks, seq)
        blocks.free(seq)
    assert list(blocks.tiers[0].blocks) == old.block_hashes
    push_out(blocks, 1)
    assert list(blocks.tiers[0].blocks) == new.block_hashes


def test_admission_counts_swapped_blocks_as_new() -> None:
    blocks, seq, other = manager(3, 8), sequence(2 * SIZE + 1), sequence(1, first_token=70)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 3 * SIZE)
    prefix = blocks.cached_prefix(seq)
    assert prefix.num_blocks == 2
    assert blocks.can_admit(seq, prefix)
    run(blocks, other)
    assert not blocks.can_admit(seq, prefix)


@pytest.mark.parametrize(("overhead_s", "num_blocks"), [(0.0, 2), (5.9, 2), (6.1, 0)])
def test_what_costs_more_to_copy_than_to_compute_is_computed(overhead_s: float, num_blocks: int) -> None:
    """Eight tokens at a second each, or two blocks at a second each and the overhead."""
    costs = SwapCosts(out_s=(1.0,), in_s=(1.0,), overhead_s=overhead_s, token_s=1.0)
    blocks, seq = manager(3, 8, costs=costs), sequence(2 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 3 * SIZE)
    assert blocks.cached_prefix(seq).num_blocks == num_blocks
    copies = run(blocks, seq)
    assert sum(c.kind is CopyKind.IN for c in copies) == blocks.num_swapped_in == num_blocks


def test_a_window_brings_only_what_it_sees() -> None:
    blocks, seq = manager(4, 16, None, SIZE + 1), sequence(3 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 4 * SIZE)
    prefix = blocks.cached_prefix(seq)
    assert (prefix.num_blocks, prefix.swapped) == (3, ((0, 1, 2), (2,)))
    copies = run(blocks, seq)
    assert [sum(c.kind is CopyKind.IN and c.group == i for c in copies) for i in (0, 1)] == [3, 1]
    assert [t.first for t in seq.block_tables] == [0, 2]


def test_a_prefix_ends_where_neither_has_a_block() -> None:
    blocks, seq = manager(3, 8), sequence(2 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 3 * SIZE)
    blocks.tiers[0].forget(seq.block_hashes[1])
    assert blocks.cached_prefix(seq).swapped == ((0,),)
    blocks.tiers[0].forget(seq.block_hashes[0])
    assert blocks.cached_prefix(seq).num_blocks == 0


def test_without_swap_space_what_is_evicted_is_gone() -> None:
    for blocks in (manager(3, 8, costs=None), manager(3, 0)):
        seq = sequence(2 * SIZE + 1)
        run(blocks, seq)
        blocks.free(seq)
        assert push_out(blocks, 3 * SIZE) == ()
        assert blocks.cached_prefix(seq).num_blocks == 0


def test_without_prefix_caching_a_request_finds_its_own_blocks_and_no_other_does() -> None:
    blocks, seq, twin = manager(3, 8, caching=False), sequence(2 * SIZE + 1), sequence(2 * SIZE + 1)
    run(blocks, seq)
    assert blocks.cached_prefix(twin).num_blocks == 0
    blocks.free(seq)
    assert blocks.cached_prefix(seq).num_blocks == 2
    assert blocks.cached_prefix(twin).num_blocks == 0
    push_out(blocks, 3 * SIZE)
    assert blocks.cached_prefix(seq).swapped == ((0, 1),)
    assert blocks.cached_prefix(twin).num_blocks == 0


@pytest.mark.parametrize("caching", [True, False])
def test_what_nobody_can_find_any_more_is_forgotten(caching: bool) -> None:
    blocks, seq = manager(3, 8, caching=caching), sequence(2 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 2 * SIZE)
    run(blocks, seq)
    blocks.end(seq)
    found = [h in blocks.pools[0].cache.blocks or h in blocks.tiers[0] for h in seq.block_hashes]
    assert found == [caching, caching]
    blocks.check_integrity([])


def test_a_sibling_still_finds_the_prompt() -> None:
    """Without prefix caching, when one of the request's sequences has ended."""
    blocks, seq = manager(4, 8, caching=False), sequence(2 * SIZE + 1, n=2)
    run(blocks, seq)
    seq.token_ids += range(SIZE)
    run(blocks, seq)
    child = make(seq.request, seq.seq_id + 1, list(seq.request.prompt_token_ids), index=1)
    assert len(seq.block_hashes) == 3
    blocks.end(seq)
    assert [h in blocks.pools[0].cache.blocks for h in seq.block_hashes] == [True, True, False]
    assert blocks.cached_prefix(child).num_blocks == 2


def test_prompt_logprobs_take_nothing_from_the_host() -> None:
    blocks, seq = manager(3, 8), sequence(2 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 3 * SIZE)
    assert blocks.cached_prefix(sequence(2 * SIZE + 1, prompt_logprobs=0)).num_blocks == 0
    assert blocks.cached_prefix(sequence(2 * SIZE + 1)).num_blocks == 2


def test_what_gave_nan_is_forgotten_on_the_host_too() -> None:
    blocks, seq = manager(3, 8), sequence(2 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 2 * SIZE)
    run(blocks, seq)
    blocks.unpublish(seq)
    assert not any(h in blocks.tiers[0] for h in seq.block_hashes)
    blocks.free(seq)
    assert blocks.cached_prefix(seq).num_blocks == 0
    blocks.check_integrity([])


def test_a_reset_forgets_the_host_too() -> None:
    blocks, seq = manager(3, 8, None, 100), sequence(2 * SIZE + 1)
    run(blocks, seq)
    blocks.free(seq)
    push_out(blocks, 3 * SIZE)
    assert all(tier.blocks for tier in blocks.tiers)
    blocks.reset_cache()
    assert not any(tier.blocks for tier in blocks.tiers)
    assert blocks.cached_prefix(seq).num_blocks == 0
    blocks.check_integrity([])


def test_a_damaged_tier_is_noticed() -> None:
    blocks = manager(3, 8)
    blocks.check_integrity([])
    blocks.tiers[0]._free.pop()
    with pytest.raises(AssertionError):
        blocks.check_integrity([])
