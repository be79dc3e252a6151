"""The second level of the prefix cache: host blocks that hold what was evicted from the device.

A device block that is evicted is copied out, unless the host has its hash already; a later sequence with that prefix,
such as one that was preempted, gets it copied back, if that costs less than computing its tokens again. The host keeps
its copy meanwhile, so a block that goes back and forth is copied out once. Where there is no room, the least recently
used host block gives way.

    free ──store──▶ held for a hash ◀──put_back── taken (being copied back, does not give way)
      ▲                 │  │  │                      ▲
      └─ forget, clear ─┘  │  └──────── take ────────┘
                           └── store of another hash where none is free ──▶ held for that hash
"""

from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapCosts:
    """What decides between copying blocks back and computing their tokens again: measured seconds.

    `out_s` and `in_s` are those of one block by cache group, `overhead_s` what any copying back costs besides, and
    `token_s` what a token costs to compute.
    """

    out_s: tuple[float, ...]
    in_s: tuple[float, ...]
    overhead_s: float
    token_s: float

    def pays(self, num_blocks: Seq[int], num_tokens: int) -> bool:
        """Whether to copy so many blocks of each group back rather than compute so many tokens."""
        copying = self.overhead_s + sum(n * s for n, s in zip(num_blocks, self.in_s, strict=True))
        return copying < num_tokens * self.token_s

    def ever_pays(self, block_size: int) -> bool:
        """Whether there is a run of blocks, however long, that costs less to copy out and back than to compute."""
        return sum(self.out_s) + sum(self.in_s) < block_size * self.token_s


class HostTier:
    """The host blocks of one cache group by hash, in order of last use."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._block_by_hash: OrderedDict[bytes, int] = OrderedDict()

    @property
    def blocks(self) -> Mapping[bytes, int]:
        """Every hash that is held, with its host block; the least recently used one first."""
        return self._block_by_hash

    def __contains__(self, block_hash: object) -> bool:
        return block_hash in self._block_by_hash

    def store(self, block_hash: bytes) -> int | None:
        """The host block to copy a block of this hash to, which holds it from now on.

        None if nothing is to be copied: the hash is held already (it counts as used), or every block is taken.
        """
        if block_hash in self._block_by_hash:
            self._block_by_hash.move_to_end(block_hash)
            return None
        if self._free:
            block = self._free.pop()
        elif self._block_by_hash:
            _, block = self._block_by_hash.popitem(last=False)
        else:
            return None
        self._block_by_hash[block_hash] = block
        return block

    def take(self, block_hash: bytes) -> int:
        """The host block of a hash that is held; it does not give way until it is put back."""
        return self._block_by_hash.pop(block_hash)

    def put_back(self, block_hash: bytes, block: int) -> None:
        """Ends a `take`; the block is the last to give way."""
        self._block_by_hash[block_hash] = block

    def forget(self, block_hash: bytes) -> None:
        """Frees the host block of this hash, if there is one."""
        block = self._block_by_hash.pop(block_hash, None)
        if block is not None:
            self._free.append(block)

    def clear(self) -> None:
        """Frees every block."""
        self._free += self._block_by_hash.values()
        self._block_by_hash.clear()

    def check_integrity(self) -> None:
        """Asserts that every block is free or held by one hash; none is taken between two calls of the manager."""
        blocks = [*self._free, *self._block_by_hash.values()]
        assert sorted(blocks) == list(range(self.num_blocks)), "a host block is lost, or in two states"
