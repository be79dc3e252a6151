"""What the oracle of `scheduler_simulation` knows of windows, prefixes, and swaps between device and host."""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import lru_cache

from fairlead.request import BlockTable
from fairlead.scheduling.batch import CopyKind, ScheduledBatch
from fairlead.scheduling.block_manager import BlockManager, CachedPrefix
from fairlead.scheduling.host_tier import SwapCosts
from fairlead.scheduling.prefix_cache import PrefixCache

Tables = list[dict[int, int]]  # of one sequence: per group, the block of each block number


class CountedCache(PrefixCache):
    """A prefix cache that counts its evictions: a block may be published and evicted within one step."""

    _num_evicted = 0

    def evict(self) -> tuple[int, bytes]:
        """Counts, and evicts."""
        self._num_evicted += 1
        return super().evict()

    def take_evicted(self) -> int:
        """The evictions since the last call."""
        count, self._num_evicted = self._num_evicted, 0
        return count


def first_read(sliding_window: int | None, position: int) -> int:
    """The first token that a query sees."""
    return position - min(position, sliding_window - 1) if sliding_window is not None else 0


@lru_cache(maxsize=100_000)
def most_blocks(sliding_window: int | None, start: int, end: int, block_size: int, max_chunk: int) -> int:
    """The most blocks that a sequence of `end` tokens can hold from token `start` on: by trial of every chunk."""
    return max(
        -(-min(first + max_chunk, end) // block_size) - first_read(sliding_window, first) // block_size
        for first in range(start, end)
    )


def expected_prefix(
    blocks: BlockManager, hashes: list[bytes], costs: SwapCosts | None, seen: Counter[str]
) -> CachedPrefix:
    """The longest prefix whose visible part is cached in every group.

    What is on the host counts only if copying it costs less than computing the tokens that it adds.
    """
    on_device = longest = _prefix(blocks, [])
    assert on_device is not None
    for end in range(1, len(hashes) + 1):
        prefix = _prefix(blocks, hashes[:end])
        longest = prefix or longest
        if prefix is not None and not any(prefix.swapped):
            on_device = prefix
    assert longest is not None
    num_tokens = (longest.num_blocks - on_device.num_blocks) * blocks.block_size
    if costs is None or num_tokens == 0:
        return on_device
    copying = sum(len(numbers) * s for numbers, s in zip(longest.swapped, costs.in_s, strict=True))
    pays = costs.overhead_s + copying < num_tokens * costs.token_s
    seen["recomputed by choice"] += not pays
    return longest if pays else on_device


def check_swaps(
    batch: ScheduledBatch,
    blocks: BlockManager,
    before: Mapping[int, Tables],
    now: Mapping[int, Tables],
    cached_before: Seq[Mapping[int, bytes]],
    seen: Counter[str],
) -> None:
    """What comes back belongs to a sequence that was admitted; what is evicted goes to the host if there is room.

    What goes there was held or cached before the step was scheduled: none of it has yet to be computed by that step.
    """
    for i, (pool, tier) in enumerate(zip(blocks.pools, blocks.tiers, strict=True)):
        held_before = {block for tables in before.values() for block in tables[i].values()} | cached_before[i].keys()
        admitted = {block for seq_id in now.keys() - before.keys() for block in now[seq_id][i].values()}
        brought = [c.destination for c in batch.block_copies if c.group == i and c.kind is CopyKind.IN]
        assert len(set(brought)) == len(brought)
        assert admitted >= set(brought)
        pushed = [c.source for c in batch.block_copies if c.group == i and c.kind is CopyKind.OUT]
        assert len(set(pushed)) == len(pushed), "evicted twice"
        assert held_before >= set(pushed)
        is_full = len(tier.blocks) == tier.num_blocks
        evicted = {h for block, h in cached_before[i].items() if pool.cache.hashes.get(block) != h}
        assert is_full or tier.blocks.keys() >= evicted, "an evicted block was lost"
        seen["swapped out"] += len(pushed)
        seen["swapped in"] += len(brought)


def _prefix(blocks: BlockManager, hashes: list[bytes]) -> CachedPrefix | None:
    """The cached prefix of these very hashes, if there is one."""
    tables, swapped = [], []
    for group, pool, tier in zip(blocks.groups, blocks.pools, blocks.tiers, strict=True):
        first = first_read(group.sliding_window, len(hashes) * blocks.block_size) // blocks.block_size
        found = [pool.cache.get(h) for h in hashes[first:]]
        lacking = [i for i, h in enumerate(hashes) if i >= first and found[i - first] is None]
        if any(hashes[i] not in tier for i in lacking):
            return None
        tables.append(BlockTable(first, [b for b in found if b is not None]))
        swapped.append(tuple(lacking))
    return CachedPrefix(num_blocks=len(hashes), tables=tuple(tables), swapped=tuple(swapped))
