"""Gives sequences their KV blocks: tables, prefix reuse, copy-on-write, sliding windows.

A model has one cache group per kind of attention layer. Each group has its own pool and each sequence a table in it;
a group with a sliding window holds only the blocks that a later token can still see. A sequence writes only to blocks
that it alone holds and that are not cached; a shared one is copied first.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

from fairlead.request import BlockTable, Sequence
from fairlead.scheduling.block_pool import BlockPool
from fairlead.scheduling.prefix_cache import block_hash, root_hash

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """One kind of attention layer: its number of blocks, and how many tokens back a query sees (None: all)."""

    num_blocks: int
    sliding_window: int | None = None

    def first_visible(self, position: int) -> int:
        """The first token that the query at a position can see."""
        return 0 if self.sliding_window is None else max(0, position - self.sliding_window + 1)


def blocks_per_sequence(sliding_window: int | None, num_tokens: int, block_size: int, max_chunk: int) -> int:
    """The most blocks that a sequence of so many tokens ever holds, computed in chunks of at most `max_chunk`."""
    whole = -(-num_tokens // block_size)
    if sliding_window is None:
        return whole
    return min(whole, -(-(sliding_window - 1 + max_chunk) // block_size) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPrefix:
    """The blocks of a cached prefix, by group; nobody holds them on its account yet."""

    num_blocks: int
    tables: tuple[BlockTable, ...]


class BlockManager:
    """Paged KV memory as integers. All groups have the same block size, in tokens."""

    def __init__(
        self, groups: Seq[CacheGroup], block_size: int, *, max_chunk: int, enable_prefix_caching: bool
    ) -> None:
        self.groups, self.block_size = tuple(groups), block_size
        self._max_chunk, self._caching = max_chunk, enable_prefix_caching
        self.pools = tuple(BlockPool(g.num_blocks) for g in groups)

    @property
    def usage(self) -> float:
        """Share of the blocks that sequences hold, in the fullest group."""
        return max(pool.num_referenced / pool.num_blocks for pool in self.pools)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that this many tokens take."""
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, seq: Sequence) -> CachedPrefix:
        """The longest cached prefix of a sequence; at least its last token is left to compute.

        Takes no reference. Hashes are kept in the sequence, so that each block is hashed once in its life.
        """
        # Prompt log-probabilities come from computing the prompt: such a request takes nothing from the cache.
        may_hit = self._caching and seq.may_hit_cache and seq.prompt_logprobs is None
        num_full = (seq.num_tokens - 1) // self.block_size if may_hit else 0
        self._extend_hashes(seq, num_full)
        hashes = seq.block_hashes[:num_full]
        for group, pool in self._with(self.pools):
            if group.sliding_window is None:  # cheap where little is cached: a long prompt may wait for many steps
                hashes = hashes[: _num_leading(pool, hashes)]
        runs = [_runs(pool, hashes) for pool in self.pools]
        num_blocks = len(hashes)
        while not all(run[num_blocks] >= num_blocks - self._first_needed(g, num_blocks) for g, run in self._with(runs)):
            num_blocks -= 1
        tables = []
        for group, pool in self._with(self.pools):
            first = self._first_needed(group, num_blocks)
            blocks = [pool.cache.get(h) for h in hashes[first:num_blocks]]
            tables.append(BlockTable(first, [b for b in blocks if b is not None]))
        return CachedPrefix(num_blocks=num_blocks, tables=tuple(tables))

    def can_admit(self, seq: Sequence, prefix: CachedPrefix, claimed: Seq[int] | None = None) -> bool:
        """Whether a waiting sequence fits whole, its cached prefix taken into account.

        `claimed` blocks of each group are left to others.
        """
        missing = self._num_missing(seq, prefix.tables)
        return all(
            num_new + others <= pool.num_available - pool.num_idle(table.blocks)
            for pool, table, num_new, others in zip(
                self.pools, prefix.tables, missing, claimed or [0] * len(self.pools), strict=True
            )
        )

    def num_claimed(self, seqs: Iterable[Sequence]) -> list[int]:
        """The blocks, by group, that these sequences still need until all their known tokens are computed."""
        claimed = [0] * len(self.groups)
        for seq in seqs:
            for group, num_blocks in enumerate(self._num_missing(seq, seq.block_tables)):
                claimed[group] += num_blocks
        return claimed

    def attach(self, seq: Sequence, prefix: CachedPrefix) -> None:
        """Gives a sequence without blocks its cached prefix and counts those tokens as computed."""
        assert not seq.block_tables
        for pool, table in zip(self.pools, prefix.tables, strict=True):
            for block in table.blocks:
                pool.reference(block)
        seq.block_tables = list(prefix.tables)
        seq.num_published = prefix.num_blocks
        seq.has_shared_context = prefix.num_blocks > 0
        seq.num_computed_tokens = prefix.num_blocks * self.block_size

    def reserve(self, seq: Sequence, num_tokens: int) -> list[tuple[int, int, int]] | None:
        """Makes room for the next `num_tokens` tokens of a sequence and publishes the blocks that they fill.

        Returns the block copies (group, source, destination) to make before the step writes, or None, with nothing
        taken, when too few blocks are left. Blocks that no later token can see are released. Blocks are published
        before they are computed: a step writes all keys and values of a layer before it reads any, so a sequence of
        the same step may already share them. One that a token fills which is not known yet is published later, at the
        next call or when the sequence is freed.
        """
        start = seq.num_computed_tokens
        first, end = start // self.block_size, self.num_blocks_for(start + num_tokens)
        self._publish(seq, start)
        shared: list[bool] = []
        for group, pool, table in zip(self.groups, self.pools, seq.block_tables, strict=True):
            self._release_before(group.first_visible(start) // self.block_size, pool, table)
            is_shared = first < table.end and not pool.is_writable(table.blocks[first - table.first])
            if end - table.end + is_shared > pool.num_available:
                return None
            shared.append(is_shared)
        copies = []
        for i, (pool, table) in enumerate(zip(self.pools, seq.block_tables, strict=True)):
            if shared[i]:
                source, copy = table.blocks[first - table.first], pool.allocate()
                table.blocks[first - table.first] = copy
                copies.append((i, source, copy))
                pool.release(source)
            while table.end < end:
                table.blocks.append(pool.allocate())
        self._publish(seq, start + num_tokens)
        seq.tables_snapshot = tuple((table.first, tuple(table.blocks)) for table in seq.block_tables)
        seq.quiet_until = end * self.block_size
        for group, table in self._with(seq.block_tables):
            if group.sliding_window is not None:
                leaves_at = (table.first + 1) * self.block_size + group.sliding_window - 1
                seq.quiet_until = min(seq.quiet_until, leaves_at)
        return copies

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Shares the parent's blocks of the first `num_tokens` tokens; either copies before it writes there."""
        assert not child.block_tables
        child.num_computed_tokens, child.has_shared_context = num_tokens, True
        end = self.num_blocks_for(child.num_computed_tokens)
        child.num_published = child.num_computed_tokens // self.block_size
        child.block_hashes = parent.block_hashes[: child.num_published]
        parent.quiet_until = 0
        for pool, table in zip(self.pools, parent.block_tables, strict=True):
            shared = table.blocks[: max(0, end - table.first)]
            child.block_tables.append(BlockTable(table.first, shared))
            for block in shared:
                pool.reference(block)

    def free(self, seq: Sequence) -> None:
        """Takes all blocks from a sequence; the last ones become the first to be evicted."""
        self._publish(seq, seq.num_computed_tokens)
        for pool, table in zip(self.pools, seq.block_tables, strict=False):
            for block in reversed(table.blocks):
                pool.release(block)
        seq.block_tables, seq.tables_snapshot = [], ()
        seq.num_computed_tokens = seq.num_published = seq.quiet_until = 0

    def unpublish(self, seq: Sequence) -> None:
        """Forgets the cached prefix of a sequence, blocks that left its windows included: it is not to be trusted."""
        for pool in self.pools:
            for its_hash in seq.block_hashes:
                pool.forget(its_hash)

    def reset_cache(self) -> None:
        """Forgets all cached prefixes; sequences keep the blocks that they hold."""
        for pool in self.pools:
            pool.reset_cache()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts the invariants over all live sequences; for tests and for an idle engine."""
        tables = [seq.block_tables for seq in sequences if seq.block_tables]
        assert all(len(t) == len(self.groups) for t in tables)
        for i, pool in enumerate(self.pools):
            pool.check_integrity(block for table in tables for block in table[i].blocks)

    def _with(self, values: Seq[T]) -> Iterator[tuple[CacheGroup, T]]:
        return zip(self.groups, values, strict=True)

    def _first_needed(self, group: CacheGroup, num_blocks: int) -> int:
        """The first block that a sequence with so many computed blocks still needs."""
        return group.first_visible(num_blocks * self.block_size) // self.block_size

    def _release_before(self, first: int, pool: BlockPool, table: BlockTable) -> None:
        num_gone = min(first - table.first, len(table.blocks))
        if num_gone > 0:
            for block in table.blocks[:num_gone]:
                pool.release(block)
            del table.blocks[:num_gone]
            table.first += num_gone

    def _publish(self, seq: Sequence, num_tokens: int) -> None:
        """Makes the blocks findable that the first `num_tokens` tokens fill, as far as those are known."""
        num_full = min(num_tokens, seq.num_tokens) // self.block_size
        if not self._caching or num_full <= seq.num_published:
            return
        self._extend_hashes(seq, num_full)
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            for i in range(seq.num_published, num_full):
                pool.cache.publish(table.blocks[i - table.first], seq.block_hashes[i])
        seq.num_published = num_full

    def _num_missing(self, seq: Sequence, tables: Seq[BlockTable]) -> Iterator[int]:
        """By group, the blocks that a sequence needs beyond its tables to compute all its known tokens."""
        end = self.num_blocks_for(seq.num_tokens)
        for group, table in self._with(tables):
            most = blocks_per_sequence(group.sliding_window, seq.num_tokens, self.block_size, self._max_chunk)
            yield min(most, end - table.first) - len(table.blocks)

    def _extend_hashes(self, seq: Sequence, num_full: int) -> None:
        hashes, size = seq.block_hashes, self.block_size
        for i in range(len(hashes), num_full):
            parent = hashes[-1] if hashes else root_hash(seq.request.cache_salt)
            hashes.append(block_hash(parent, seq.token_ids[i * size : (i + 1) * size]))


def _num_leading(pool: BlockPool, hashes: Seq[bytes]) -> int:
    """How many blocks from the first one on are cached without a gap."""
    return next((i for i, h in enumerate(hashes) if pool.cache.get(h) is None), len(hashes))


def _runs(pool: BlockPool, hashes: Seq[bytes]) -> list[int]:
    """For every i up to len(hashes): how many cached blocks without a gap end before block i."""
    runs = [0]
    for h in hashes:
        runs.append(0 if pool.cache.get(h) is None else runs[-1] + 1)
    return runs
