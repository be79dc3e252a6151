"""Owns the KV blocks: who holds which, how many hold it, which are free.

Every block is in exactly one state: free, referenced (count > 0), or idle in the prefix cache (count 0, evictable).
A sequence may write only to blocks that it alone holds and that are not cached; a shared one is copied first.
"""

from collections.abc import Iterable

from fairlead.request import Sequence
from fairlead.scheduling.prefix_cache import PrefixCache, block_hash, root_hash


class BlockManager:
    """Paged KV memory as integers: allocation, reference counts, prefix reuse, copy-on-write."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._caching = enable_prefix_caching
        self._cache = PrefixCache()
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: the free and the idle ones."""
        return len(self._free) + self._cache.num_idle

    @property
    def num_referenced(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_blocks - self.num_available

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that this many tokens take."""
        return -(-num_tokens // self.block_size)

    def cached_prefix(self, seq: Sequence) -> list[int]:
        """The blocks of the longest cached prefix of a sequence; at least its last token is left to compute.

        Takes no reference. Hashes are kept in the sequence, so that each block is hashed once in its life.
        """
        if not self._caching:
            return []
        num_full = (seq.num_tokens - 1) // self.block_size
        self._extend_hashes(seq, num_full)
        blocks: list[int] = []
        for h in seq.block_hashes[:num_full]:
            block = self._cache.get(h)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def can_admit(self, seq: Sequence, cached: list[int]) -> bool:
        """Whether a waiting sequence fits whole, its cached prefix taken into account."""
        num_new = self.num_blocks_for(seq.num_tokens) - len(cached)
        num_idle_hits = sum(1 for b in cached if self._refs[b] == 0)
        return num_new <= self.num_available - num_idle_hits

    def attach(self, seq: Sequence, cached: list[int]) -> None:
        """Gives a sequence without blocks its cached prefix and counts those tokens as computed."""
        assert not seq.block_table
        for block in cached:
            self._reference(block)
        seq.block_table = list(cached)
        seq.num_computed_tokens = len(cached) * self.block_size

    def reserve(self, seq: Sequence, num_tokens: int) -> list[tuple[int, int]] | None:
        """Makes room for the next `num_tokens` tokens of a sequence and publishes the blocks that they fill.

        Returns the block copies (source, destination) to make before the step writes, or None, with nothing changed,
        when too few blocks are left. Blocks are published before they are computed: a step writes all keys and values
        of a layer before it reads any, so a sequence of the same step may already share them.
        """
        end = seq.num_computed_tokens + num_tokens
        table = seq.block_table
        first = seq.num_computed_tokens // self.block_size
        copy_first = first < len(table) and not self._writable(table[first])
        num_new = self.num_blocks_for(end) - len(table)
        if num_new + copy_first > self.num_available:
            return None
        copies = []
        if copy_first:
            source, table[first] = table[first], self._allocate()
            copies.append((source, table[first]))
            self._release(source)
        for _ in range(num_new):
            table.append(self._allocate())
        if self._caching:
            self._publish(seq, first, end // self.block_size)
        return copies

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Shares the parent's blocks that hold the child's computed tokens; either copies before it writes there."""
        assert not child.block_table
        child.block_table = parent.block_table[: self.num_blocks_for(child.num_computed_tokens)]
        child.block_hashes = parent.block_hashes[: child.num_computed_tokens // self.block_size]
        for block in child.block_table:
            self._reference(block)

    def free(self, seq: Sequence) -> None:
        """Takes all blocks from a sequence; the last ones become the first to be evicted."""
        for block in reversed(seq.block_table):
            self._release(block)
        seq.block_table = []
        seq.num_computed_tokens = 0

    def unpublish(self, seq: Sequence) -> None:
        """Forgets the cached blocks of a sequence: what they hold is not to be trusted."""
        for block in seq.block_table:
            self._cache.forget(block)

    def reset_cache(self) -> None:
        """Forgets all cached prefixes; sequences keep the blocks that they hold."""
        self._free += self._cache.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts the invariants over all live sequences; for tests and for an idle engine."""
        counts = [0] * self.num_blocks
        for seq in sequences:
            for block in seq.block_table:
                counts[block] += 1
        assert counts == self._refs, "a reference count differs from the tables that hold the block"
        self._cache.check_integrity(self._refs)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert all(counts[b] == 0 and b not in self._cache for b in free), "a free block is in use"
        referenced = sum(1 for c in counts if c)
        assert len(free) + referenced + self._cache.num_idle == self.num_blocks, "a block is lost"

    def _writable(self, block: int) -> bool:
        return self._refs[block] == 1 and block not in self._cache

    def _allocate(self) -> int:
        block = self._free.pop() if self._free else self._cache.evict()
        assert self._refs[block] == 0
        self._refs[block] = 1
        return block

    def _reference(self, block: int) -> None:
        if self._refs[block] == 0:
            self._cache.set_busy(block)
        self._refs[block] += 1

    def _release(self, block: int) -> None:
        self._refs[block] -= 1
        assert self._refs[block] >= 0
        if self._refs[block] == 0:
            if block in self._cache:
                self._cache.set_idle(block)
            else:
                self._free.append(block)

    def _publish(self, seq: Sequence, first: int, num_full: int) -> None:
        self._extend_hashes(seq, num_full)
        for i in range(first, num_full):
            self._cache.publish(seq.block_table[i], seq.block_hashes[i])

    def _extend_hashes(self, seq: Sequence, num_full: int) -> None:
        hashes, size = seq.block_hashes, self.block_size
        for i in range(len(hashes), num_full):
            parent = hashes[-1] if hashes else root_hash(seq.request.cache_salt)
            hashes.append(block_hash(parent, seq.token_ids[i * size : (i + 1) * size]))
