"""Which KV blocks hold which token prefix.

A full block is known by a SHA-256 over its parent's hash and its own tokens, so equal hashes mean equal prefixes.

    free ──allocate──▶ referenced ──publish──▶ referenced, cached ──last reference gone──▶ idle (evictable)
                            ▲                                                                  │
                            └───────────────────────── hit ────────────────────────────────────┘
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq


def root_hash(cache_salt: str) -> bytes:
    """The parent of a first block; tenants of different salts never share blocks."""
    return hashlib.sha256(b"fairlead-prefix\0" + cache_salt.encode()).digest()


def private_root_hash(request_number: int) -> bytes:
    """The parent of a first block that no other request may find. A number stands for one request, ever."""
    return hashlib.sha256(b"fairlead-private\0" + str(request_number).encode()).digest()


def block_hash(parent: bytes, token_ids: Seq[int]) -> bytes:
    """The hash of a full block that follows `parent`."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes()).digest()


class PrefixCache:
    """Two-way map between hashes and blocks, with the idle blocks in order of last use.

    Idle means cached and referenced by no sequence. The block manager owns the reference counts and tells this class
    when a block becomes idle or busy.
    """

    def __init__(self) -> None:
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def hashes(self) -> Mapping[int, bytes]:
        """Every cached block with its hash."""
        return self._hash_by_block

    @property
    def blocks(self) -> Mapping[bytes, int]:
        """Every hash that is cached, with its block."""
        return self._block_by_hash

    def __contains__(self, block: int) -> bool:
        return block in self._hash_by_block

    def get(self, block_hash: bytes) -> int | None:
        """The block of this hash, or None. Changes nothing."""
        return self._block_by_hash.get(block_hash)

    def publish(self, block: int, block_hash: bytes) -> None:
        """Makes a referenced block findable; does nothing if another block already has this hash."""
        if block_hash not in self._block_by_hash:
            assert block not in self._hash_by_block
            self._block_by_hash[block_hash] = block
            self._hash_by_block[block] = block_hash

    def set_idle(self, block: int) -> None:
        """The last reference to a cached block is gone: it becomes the last to be evicted."""
        self._idle[block] = None

    def set_busy(self, block: int) -> None:
        """A hit: the idle block is referenced again."""
        del self._idle[block]

    def evict(self) -> tuple[int, bytes]:
        """Forgets the least recently used idle block and returns it with its hash. Raises KeyError if none is idle."""
        block, _ = self._idle.popitem(last=False)
        its_hash = self._hash_by_block.pop(block)
        del self._block_by_hash[its_hash]
        return block, its_hash

    def forget(self, block_hash: bytes) -> int | None:
        """Makes the block of this hash, if there is one, unfindable; returns it if it was idle and is free now."""
        block = self._block_by_hash.pop(block_hash, None)
        if block is None:
            return None
        del self._hash_by_block[block]
        if block not in self._idle:
            return None
        del self._idle[block]
        return block

    def clear(self) -> list[int]:
        """Forgets every block; returns those that were idle and are free now."""
        idle = list(self._idle)
        self._idle.clear()
        self._block_by_hash.clear()
        self._hash_by_block.clear()
        return idle

    def check_integrity(self, refs: Seq[int]) -> None:
        """Asserts that both directions agree and that exactly the unreferenced cached blocks are idle."""
        assert {b: h for h, b in self._block_by_hash.items()} == self._hash_by_block
        assert {b for b in self._hash_by_block if refs[b] == 0} == set(self._idle)
