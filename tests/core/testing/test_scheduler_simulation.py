"""The simulation sees planted bugs: each of them changes what a sequence reads, holds or waits for."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

import pytest

from fairlead.request import BlockTable, Sequence
from fairlead.scheduling import block_manager
from fairlead.scheduling.batch import BatchDraft, BlockCopy, CopyKind
from fairlead.scheduling.block_manager import BlockManager, CacheGroup
from fairlead.scheduling.block_pool import BlockPool
from fairlead.scheduling.host_tier import HostTier, SwapCosts
from fairlead.scheduling.prefix_cache import root_hash
from fairlead.scheduling.scheduler import Scheduler
from fairlead.testing.scheduler_simulation import simulate

first_visible, release_before = CacheGroup.first_visible, BlockManager._release_before
take_copies, swap_in = BlockManager.take_copies, BlockManager._swap_in
publish, fork, store = BlockManager._publish, BlockManager.fork, HostTier.store
continue_running, start_over = Scheduler._continue_running, Scheduler._start_over


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


def _publish_one_off(self: BlockManager, seq: Sequence, num_tokens: int) -> None:
    hashes = seq.block_hashes
    self._extend_hashes(seq, min(num_tokens, seq.num_tokens) // self.block_size)
    seq.block_hashes = [*hashes[1:], *hashes[:1]]
    publish(self, seq, num_tokens)
    seq.block_hashes = hashes


def _fork_without_first(self: BlockManager, parent: Sequence, child: Sequence, num_tokens: int) -> None:
    fork(self, parent, child, num_tokens)
    child.block_tables = [BlockTable(0, table.blocks) for table in child.block_tables]


def _runs_ahead(self: Scheduler, step: BatchDraft) -> None:
    for seq in self.running:
        seq.num_seats, seq.max_num_tokens = 1, 1000
    continue_running(self, step)


def _keeps_stale_tokens(self: Scheduler, seq: Sequence) -> None:
    start_over(self, seq)
    seq.num_pending, seq.num_stale = seq.num_stale, 0


def _preempts_first(self: Scheduler) -> Sequence:
    seq = self.running[0]
    self._leave_running(seq)
    self._send_back(seq)
    return seq


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
    "admits what does not fit": (BlockManager, "can_admit", lambda self, seq, prefix, claimed=None: True),
    "admits nothing beside another": (
        BlockManager,
        "can_admit",
        lambda self, seq, prefix, claimed=None: not self.usage,
    ),
    "admits what others have claimed": (BlockManager, "num_claimed", lambda self, seqs: [0] * len(self.groups)),
    "publishes tokens that it does not know": (
        Sequence,
        "num_tokens",
        property(lambda seq: len(seq.token_ids) + seq.num_pending),
    ),
    "goes on behind the end": (Scheduler, "_continue_running", _runs_ahead),
    "takes tokens of what it gave up": (Scheduler, "_start_over", _keeps_stale_tokens),
    "never starts over": (Scheduler, "_start_over", lambda self, seq: None),
    "makes no way": (Scheduler, "_make_way", lambda self, step: None),
    "one prompt takes the whole budget": (Scheduler, "_chunk_of", lambda self, num_tokens, budget: num_tokens),
    "preempts the first in line": (Scheduler, "_preempt_last", _preempts_first),
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
    with pytest.raises((AssertionError, IndexError, KeyError, ValueError)):
        simulate(0, 20_000)
