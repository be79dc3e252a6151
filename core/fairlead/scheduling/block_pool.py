"""The physical KV blocks of one cache group: which are free, how many sequences hold each, which are cached.

Every block is in exactly one state: free, referenced (count > 0), or idle in the prefix cache (count 0, evictable).
"""

from collections.abc import Callable, Iterable

from fairlead.scheduling.prefix_cache import PrefixCache


class BlockPool:
    """Reference counts over a fixed number of blocks; a block whose last reference goes stays cached if it was."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int, bytes], None] | None = None) -> None:
        """`on_evict` gets each evicted block with its hash before the block is handed out again."""
        self.num_blocks, self._on_evict = num_blocks, on_evict
        self.cache = PrefixCache()
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: the free and the idle ones."""
        return len(self._free) + self.cache.num_idle

    @property
    def num_referenced(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_blocks - self.num_available

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these cached blocks nobody holds."""
        return sum(1 for b in blocks if self._refs[b] == 0)

    def is_writable(self, block: int) -> bool:
        """Whether one sequence alone holds the block, and no other can find it."""
        return self._refs[block] == 1 and block not in self.cache

    def allocate(self) -> int:
        """A block with one reference; evicts the least recently used idle one if none is free."""
        if self._free:
            block = self._free.pop()
        else:
            block, its_hash = self.cache.evict()
            if self._on_evict is not None:
                self._on_evict(block, its_hash)
        assert self._refs[block] == 0
        self._refs[block] = 1
        return block

    def reference(self, block: int) -> None:
        """Adds a reference to a held or idle block."""
        if self._refs[block] == 0:
            self.cache.set_busy(block)
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """Takes a reference away; the last one makes the block idle if it is cached, else free."""
        self._refs[block] -= 1
        assert self._refs[block] >= 0
        if self._refs[block] == 0:
            if block in self.cache:
                self.cache.set_idle(block)
            else:
                self._free.append(block)

    def forget(self, block_hash: bytes) -> None:
        """Makes the block of this hash, if there is one, unfindable; an idle one is free."""
        idle = self.cache.forget(block_hash)
        if idle is not None:
            self._free.append(idle)

    def reset_cache(self) -> None:
        """Forgets all cached blocks; the idle ones are free."""
        self._free += self.cache.clear()

    def check_integrity(self, held: Iterable[int]) -> None:
        """Asserts the invariants; `held` lists every block of every table, once per table."""
        counts = [0] * self.num_blocks
        for block in held:
            counts[block] += 1
        assert counts == self._refs, "a reference count differs from the tables that hold the block"
        self.cache.check_integrity(self._refs)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert all(counts[b] == 0 and b not in self.cache for b in free), "a free block is in use"
        referenced = sum(1 for c in counts if c)
        assert len(free) + referenced + self.cache.num_idle == self.num_blocks, "a block is lost"
