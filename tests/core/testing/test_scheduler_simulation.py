"""The simulation sees planted bugs: each of them changes what a sequence reads, holds or waits for."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import pytest

from fairlead.request import BlockTable, Sequence
from fairlead.scheduling import block_manager
from fairlead.scheduling.batch import BlockCopy, CopyKind
from fairlead.scheduling.block_manager import BlockManager, CacheGroup
from fairlead.scheduling.block_pool import BlockPool
from fairlead.scheduling.host_tier import HostTier, SwapCosts
from fairlead.scheduling.prefix_cache import root_hash
from fairlead.testing.scheduler_simulation import simulate

first_visible, release_before = CacheGroup.first_visible, BlockManager._release_before
take_copies, swap_in = BlockManager.take_copies, BlockManager._swap_in
publish, fork, store, pays = BlockManager._publish, BlockManager.fork, HostTier.store, SwapCosts.pays


def _copy_in_another_group(self: BlockManager) -> tuple[BlockCopy, ...]:
    return tuple(replace(copy, group=len(self.groups) - 1 - copy.group) for copy in take_copies(self))


def _swap_in_without_hold(self: BlockManager, seq: Sequence, group: int, numbers: Seq[int]) -> None:
    tier = self.tiers[group]
    held = {seq.block_hashes[i]: tier.blocks[seq.block_hashes[i]] for i in numbers}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostTier, "take", lambda self, its_hash: held[its_hash])
        patch.setattr(HostTier, "put_back", lambda self, its_hash, block: None)
        swap_in(self, seq, group, numbers)


def _store_one_off(self: HostTier, its_hash: bytes) -> int | None:
    block = store(self, its_hash)
    return block and (block + 1) % self.num_blocks


def _publish_one_off(self: BlockManager, seq: Sequence, first: int, num_full: int) -> None:
    hashes = seq.block_hashes
    self._extend_hashes(seq, num_full)
    seq.block_hashes = [*hashes[1:], *hashes[:1]]
    publish(self, seq, first, num_full)
    seq.block_hashes = hashes


def _fork_without_first(self: BlockManager, parent: Sequence, child: Sequence) -> None:
    fork(self, parent, child)
    child.block_tables = [BlockTable(0, table.blocks) for table in child.block_tables]


BUGS: dict[str, tuple[object, str, Callable[..., Any]]] = {
    "a window ends too early": (CacheGroup, "first_visible", lambda self, i: first_visible(self, i + 1)),
    "a window ends too late": (CacheGroup, "first_visible", lambda self, i: first_visible(self, max(0, i - 1))),
    "no window ends": (BlockManager, "_release_before", lambda self, first, pool, table: None),
    "a block too few leaves": (
        BlockManager,
        "_release_before",
        lambda self, first, pool, table: release_before(self, first - 1, pool, table),
    ),
    "copies in another group": (BlockManager, "take_copies", _copy_in_another_group),
    "no copies": (BlockPool, "is_writable", lambda self, block: True),
    "writes to cached blocks": (BlockPool, "is_writable", lambda self, block: self._refs[block] == 1),
    "publishes the wrong hash": (BlockManager, "_publish", _publish_one_off),
    "forks a table without its place": (BlockManager, "fork", _fork_without_first),
    "admits what does not fit": (BlockManager, "can_admit", lambda self, seq, prefix: True),
    "admits nothing beside another": (BlockManager, "can_admit", lambda self, seq, prefix: self.usage == 0),
    "keeps what gave NaN": (BlockManager, "unpublish", lambda self, seq: None),
    "shares between tenants": (block_manager, "root_hash", lambda cache_salt: root_hash("")),
    "counts a window as nothing": (block_manager, "blocks_per_sequence", lambda window, tokens, size, chunk: 1),
    "keeps the cache at a reset": (BlockManager, "reset_cache", lambda self: None),
    "keeps the host's blocks at a reset": (HostTier, "clear", lambda self: None),
    "keeps what gave NaN on the host": (HostTier, "forget", lambda self, its_hash: None),
    "overwrites host blocks that come back": (BlockManager, "_swap_in", _swap_in_without_hold),
    "copies to another host block": (HostTier, "store", _store_one_off),
    "copies nothing to the host": (
        BlockManager,
        "take_copies",
        lambda self: tuple(c for c in take_copies(self) if c.kind is not CopyKind.OUT),
    ),
    "copies nothing back": (
        BlockManager,
        "take_copies",
        lambda self: tuple(c for c in take_copies(self) if c.kind is not CopyKind.IN),
    ),
    "copies in another order": (BlockManager, "take_copies", lambda self: take_copies(self)[::-1]),
    "evicts to nowhere": (BlockManager, "_swap_out", lambda self, group, block, its_hash: None),
    "copies back at any price": (SwapCosts, "pays", lambda self, num_blocks, num_tokens: num_tokens > 0),
    "shares among private requests": (block_manager, "private_root_hash", lambda number: root_hash("")),
}


def test_without_a_bug_there_is_no_violation() -> None:
    simulate(0, 2_000)


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, planted = BUGS[bug]
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        simulate(0, 20_000)
