"""Gives sequences their KV blocks: tables, prefix reuse, copy-on-write, sliding windows.

A model has one cache group per kind of attention layer. Each group has its own pool and each sequence a table in it;
a group with a sliding window holds only the blocks that a later token can still see. A sequence writes only to blocks
that it alone holds and that are not cached; a shared one is copied first.

With swap space each group has a host tier behind its prefix cache. All copies, within the device and to and from the
host, are decided one after the other, and carried out in that order before the step writes. So a copy finds in its
source what the manager believed to be there: a block that is evicted was computed in an earlier step (those of this
step's chunks are held until it is over), and what a host block holds is what the last copy to it brought.
"""

from collections.abc import Container, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fairlead.request import BlockTable, Sequence
from fairlead.scheduling.batch import BlockCopy, CopyKind
from fairlead.scheduling.block_pool import BlockPool
from fairlead.scheduling.host_tier import HostTier, SwapCosts
from fairlead.scheduling.prefix_cache import block_hash, private_root_hash, root_hash

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheGroup:
    """One kind of attention layer: its number of blocks, and how many tokens back a query sees (None: all)."""

    num_blocks: int
    sliding_window: int | None = None
    num_host_blocks: int = 0

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
    """The blocks of a cached prefix, by group; nobody holds them on its account yet.

    The tables lack the blocks that are on the host alone; `swapped` has their numbers within the prefix.
    """

    num_blocks: int
    tables: tuple[BlockTable, ...]
    swapped: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Either:
    """The hashes that at least one of two places has."""

    device: Container[bytes]
    host: Container[bytes]

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self.device or block_hash in self.host


class BlockManager:
    """Paged KV memory as integers. All groups have the same block size, in tokens.

    Without `swap_costs` there is no host tier. With one, but without prefix caching, blocks are cached for the request
    that computed them, and no other finds them.
    """

    def __init__(
        self,
        groups: Seq[CacheGroup],
        block_size: int,
        *,
        max_chunk: int,
        enable_prefix_caching: bool,
        swap_costs: SwapCosts | None = None,
    ) -> None:
        self.groups, self.block_size = tuple(groups), block_size
        self._max_chunk, self._swap_costs = max_chunk, swap_costs
        self._caching = enable_prefix_caching or swap_costs is not None
        self._is_shared = enable_prefix_caching
        self.tiers = tuple(HostTier(g.num_host_blocks if swap_costs is not None else 0) for g in groups)
        self.pools = tuple(BlockPool(g.num_blocks, partial(self._swap_out, i)) for i, g in enumerate(groups))
        self.num_swapped_out = self.num_swapped_in = 0
        self._copies: list[BlockCopy] = []

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
        prefix = self._prefix(hashes[: self._num_leading(hashes, [pool.cache.blocks for pool in self.pools])])
        if self._swap_costs is not None:
            either = [_Either(pool.cache.blocks, tier) for pool, tier in zip(self.pools, self.tiers, strict=True)]
            longer = self._prefix(hashes[: self._num_leading(hashes, either)])
            num_tokens = (longer.num_blocks - prefix.num_blocks) * self.block_size
            if self._swap_costs.pays([len(numbers) for numbers in longer.swapped], num_tokens):
                return longer
        return prefix

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
        for group, numbers in enumerate(prefix.swapped):
            self._swap_in(seq, group, numbers)

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Makes room for the next `num_tokens` tokens of a sequence and publishes the blocks that they fill.

        False, with nothing taken, when too few blocks are left. Blocks that no later token can see are released.
        Blocks are published before they are computed: a step writes all keys and values of a layer before it reads
        any, so a sequence of the same step may already share them. One that a token fills which is not known yet is
        published later, at the next call or when the sequence is freed.
        """
        start = seq.num_computed_tokens
        first, end = start // self.block_size, self.num_blocks_for(start + num_tokens)
        self._publish(seq, start)
        shared: list[bool] = []
        for group, pool, table in zip(self.groups, self.pools, seq.block_tables, strict=True):
            self._release_before(group.first_visible(start) // self.block_size, pool, table)
            is_shared = first < table.end and not pool.is_writable(table.blocks[first - table.first])
            if end - table.end + is_shared > pool.num_available:
                return False
            shared.append(is_shared)
        for i, (pool, table) in enumerate(zip(self.pools, seq.block_tables, strict=True)):
            if shared[i]:
                source, copy = table.blocks[first - table.first], pool.allocate()
                table.blocks[first - table.first] = copy
                self._copies.append(BlockCopy(kind=CopyKind.WITHIN, group=i, source=source, destination=copy))
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
        return True

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """The block copies to make, in order, before the step whose blocks were reserved since the last call writes."""
        copies, self._copies = tuple(self._copies), []
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

    def end(self, seq: Sequence) -> None:
        """Takes all blocks from a sequence that will not come back, and forgets what only it could find."""
        self.free(seq)
        if not self._is_shared:
            has_siblings = seq.request.params.num_sequences > 1  # which may still look for the prompt
            self._forget(seq.block_hashes[seq.num_prompt_tokens // self.block_size if has_siblings else 0 :])

    def unpublish(self, seq: Sequence) -> None:
        """Forgets the cached prefix of a sequence, blocks that left its windows included: it is not to be trusted."""
        self._forget(seq.block_hashes)

    def reset_cache(self) -> None:
        """Forgets all cached prefixes, on the host too; sequences keep the blocks that they hold."""
        for pool, tier in zip(self.pools, self.tiers, strict=True):
            pool.reset_cache()
            tier.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts the invariants over all live sequences; for tests and for an idle engine."""
        tables = [seq.block_tables for seq in sequences if seq.block_tables]
        assert all(len(t) == len(self.groups) for t in tables)
        for i, pool in enumerate(self.pools):
            pool.check_integrity(block for table in tables for block in table[i].blocks)
            self.tiers[i].check_integrity()

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

    def _num_leading(self, hashes: Seq[bytes], found: Seq[Container[bytes]]) -> int:
        """How many blocks the longest prefix has whose visible part is found in every group."""
        for group, these in self._with(found):
            if group.sliding_window is None:  # cheap where little is cached: a long prompt may wait for many steps
                hashes = hashes[: next((i for i, h in enumerate(hashes) if h not in these), len(hashes))]
        runs = [_runs(hashes, these) for these in found]
        num_blocks = len(hashes)
        while not all(run[num_blocks] >= num_blocks - self._first_needed(g, num_blocks) for g, run in self._with(runs)):
            num_blocks -= 1
        return num_blocks

    def _prefix(self, hashes: Seq[bytes]) -> CachedPrefix:
        """The prefix of these hashes; its visible part is cached, on the device or the host."""
        tables, swapped = [], []
        for group, pool in self._with(self.pools):
            first = self._first_needed(group, len(hashes))
            blocks = [pool.cache.blocks.get(h) for h in hashes[first:]]
            tables.append(BlockTable(first, [b for b in blocks if b is not None]))
            swapped.append(tuple(i for i, b in enumerate(blocks, first) if b is None))
        return CachedPrefix(num_blocks=len(hashes), tables=tuple(tables), swapped=tuple(swapped))

    def _swap_in(self, seq: Sequence, group: int, numbers: Seq[int]) -> None:
        """Gives a sequence the blocks of these numbers, in rising order, copied from the host and published again."""
        pool, tier, table = self.pools[group], self.tiers[group], seq.block_tables[group]
        # All are taken first: what the allocations evict goes to the host and must not push them out.
        sources = [tier.take(seq.block_hashes[i]) for i in numbers]
        for i, source in zip(numbers, sources, strict=True):
            block = pool.allocate()
            self._copies.append(BlockCopy(kind=CopyKind.IN, group=group, source=source, destination=block))
            pool.cache.publish(block, seq.block_hashes[i])
            table.blocks.insert(i - table.first, block)
        for i, source in zip(numbers, sources, strict=True):
            tier.put_back(seq.block_hashes[i], source)
        self.num_swapped_in += len(numbers)

    def _swap_out(self, group: int, block: int, its_hash: bytes) -> None:
        """An evicted block goes to the host, if there is room and it is not there yet."""
        destination = self.tiers[group].store(its_hash)
        if destination is not None:
            self._copies.append(BlockCopy(kind=CopyKind.OUT, group=group, source=block, destination=destination))
            self.num_swapped_out += 1

    def _forget(self, hashes: Seq[bytes]) -> None:
        for pool, tier in zip(self.pools, self.tiers, strict=True):
            for its_hash in hashes:
                pool.forget(its_hash)
                tier.forget(its_hash)

    def _extend_hashes(self, seq: Sequence, num_full: int) -> None:
        hashes, size = seq.block_hashes, self.block_size
        for i in range(len(hashes), num_full):
            parent = hashes[-1] if hashes else self._root_hash(seq)
            hashes.append(block_hash(parent, seq.token_ids[i * size : (i + 1) * size]))

    def _root_hash(self, seq: Sequence) -> bytes:
        # The first sequence of a request has a seq_id that no other request ever gets.
        return root_hash(seq.request.cache_salt) if self._is_shared else private_root_hash(seq.seq_id - seq.index)


def _runs(hashes: Seq[bytes], found: Container[bytes]) -> list[int]:
    """For every i up to len(hashes): how many blocks that are found end, without a gap, before block i."""
    runs = [0]
    for h in hashes:
        runs.append(runs[-1] + 1 if h in found else 0)
    return runs
