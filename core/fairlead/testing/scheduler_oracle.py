"""Knows what each sequence has to be and what each KV slot has to hold: the oracle of `scheduler_simulation`.

The numbers in the docstrings are those of reliability.md, "Scheduler simulation".
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from fairlead.request import MAX_N, BlockTable, FinishReason, Request, Sequence, SequenceDelta
from fairlead.scheduling.batch import BlockCopy, CopyKind, SampledToken, ScheduledBatch, ScheduledChunk
from fairlead.scheduling.block_manager import BlockManager, CachedPrefix, CacheGroup, blocks_per_sequence
from fairlead.scheduling.host_tier import SwapCosts
from fairlead.scheduling.prefix_cache import block_hash, private_root_hash, root_hash
from fairlead.scheduling.scheduler import NAN_ERROR, Scheduler

EOS, STOP_TOKEN = 23, 22
POISON = -1  # in a slot: NaN
_MAX_HASHES = 100_000  # that are remembered

Tables = list[dict[int, int]]  # of one sequence: per group, the block of each block number


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The engine that is simulated. `budget` is max_num_batched_tokens."""

    block_size: int
    max_model_len: int
    budget: int
    max_num_seqs: int
    caching: bool
    groups: tuple[CacheGroup, ...]
    swap_costs: SwapCosts | None = None


@dataclass(slots=True)
class Expected:
    """What the oracle knows about a sequence that has not ended."""

    request: Request
    index: int
    is_private: bool  # whether no other request may share its blocks
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # what its slots must hold: slots[i] is owner and tokens[: i + 1]
    hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as asked for
    seed: int | None = None
    num_cached_tokens: int | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        owner = int(self.request.request_id) + 100 if self.is_private else len(self.request.cache_salt)
        self.slots.append(hash((self.slots[-1] if self.slots else owner, token)))

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        for i in range(len(self.hashes), num_blocks):
            parent = self.hashes[-1] if self.hashes else self._root_hash()
            self.hashes.append(block_hash(parent, self.tokens[i * block_size : (i + 1) * block_size]))
        return self.hashes[:num_blocks]

    def _root_hash(self) -> bytes:
        if self.is_private:
            return private_root_hash(int(self.request.request_id) * MAX_N)
        return root_hash(self.request.cache_salt)


class _WatchedBlocks(BlockManager):
    """A block manager whose answers are checked when it gives them, amid a step."""

    oracle: "Oracle"

    def cached_prefix(self, seq: Sequence) -> CachedPrefix:
        prefix = super().cached_prefix(seq)
        self.oracle.check_prefix(seq, prefix)
        return prefix

    def can_admit(self, seq: Sequence, prefix: CachedPrefix) -> bool:
        fits = super().can_admit(seq, prefix)
        self.oracle.check_admission(seq, prefix, fits)
        return fits

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        fits = super().reserve(seq, num_tokens)
        if not fits:
            self.oracle.check_refusal(seq, num_tokens)
        return fits


class Oracle:
    """A scheduler, and what it has to do next. Sequences that have not ended are in `open`, by seq_id.

    `kv[group][block]` is what the worker has put into the slots of a block, `host_kv` that of the host's blocks;
    `seen` counts what happened.
    """

    def __init__(self, setup: Setup, seen: Counter[str]) -> None:
        self.setup, self.seen = setup, seen
        self.groups, self.block_size, self.budget = setup.groups, setup.block_size, setup.budget
        self.blocks = _WatchedBlocks(
            self.groups,
            self.block_size,
            max_chunk=self.budget,
            enable_prefix_caching=setup.caching,
            swap_costs=setup.swap_costs,
        )
        self.is_hashing = setup.caching or setup.swap_costs is not None
        self.blocks.oracle = self
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=setup.max_model_len,
        )
        self.kv = [[[0] * self.block_size for _ in range(group.num_blocks)] for group in self.groups]
        self.host_kv = [[[0] * self.block_size for _ in range(group.num_host_blocks)] for group in self.groups]
        self.open: dict[int, Expected] = {}  # siblings that will fork included
        self.forked: set[str] = set()  # request ids
        self._hash_of: dict[int, bytes] = {}  # content of a full block's last slot -> hash, and back
        self._content_of: dict[bytes, int] = {}
        for group in self.groups:
            exact = most_blocks(group.sliding_window, 0, setup.max_model_len, self.block_size, self.budget)
            assert exact <= self._most(group, setup.max_model_len) <= exact + 1  # one more: a copy amid a window

    def expected_deltas(self, batch: ScheduledBatch, sampled: list[SampledToken]) -> list[SequenceDelta]:
        deltas = []
        samplers = [chunk for chunk in batch.chunks if chunk.sample_seed is not None]
        for chunk, token in zip(samplers, sampled, strict=True):
            sequence = self.open.get(chunk.seq_id)
            if sequence is None:
                continue
            self._fork(sequence)
            reason, stop_reason = self._end_of(sequence, token.token_id)
            if reason is not None:
                del self.open[chunk.seq_id]
                self.seen[reason.value] += 1
            deltas.append(
                SequenceDelta(
                    request_id=sequence.request.request_id,
                    index=sequence.index,
                    token_ids=() if token.token_id is None else (token.token_id,),
                    finish_reason=reason,
                    stop_reason=stop_reason,
                    num_cached_tokens=sequence.num_cached_tokens or 0,
                    error=NAN_ERROR if token.token_id is None else None,
                )
            )
        return deltas

    def _fork(self, sequence: Expected) -> None:
        if sequence.request.request_id not in self.forked:
            self.forked.add(sequence.request.request_id)
            self.seen["forks"] += sequence.request.params.n > 1
            for sibling in self.open.values():
                if sibling.request is sequence.request:
                    sibling.num_cached_tokens = sequence.num_cached_tokens

    def _end_of(self, sequence: Expected, token: int | None) -> tuple[FinishReason | None, int | None]:
        params = sequence.request.params
        if token is None:
            return FinishReason.ERROR, None
        sequence.append(token)
        if token == EOS and not params.ignore_eos:
            return FinishReason.STOP, None
        if token in params.stop_token_ids:
            return FinishReason.STOP, token
        if sequence.num_output_tokens == params.max_tokens or len(sequence.tokens) == self.setup.max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    def reads_poison(self, chunk: ScheduledChunk, group: int) -> bool:
        """Asserts that each slot that a chunk reads holds its own prefix, or else NaN."""
        (first, blocks), end = chunk.block_tables[group], chunk.start + len(chunk.token_ids)
        low = self._first_read(group, chunk.start)
        base = first * self.block_size
        have = [slot for block in blocks for slot in self.kv[group][block]][low - base : end - base]
        want = self.open[chunk.seq_id].slots[low:end]
        if have == want:
            return False
        assert len(have) == len(want)
        for i in range(end - low):
            what = f"token {low + i} of {chunk} in {self.groups[group]}, block size {self.block_size}"
            assert have[i] in (want[i], POISON), f"{what}: reads what is not its own"
        return True

    # What holds between steps

    def check(self) -> None:
        """All that holds between steps."""
        self.scheduler.check_integrity()
        self.check_blocks()
        stats = self.scheduler.stats()
        running = {s.request.request_id for s in self.scheduler.running}
        assert stats.num_requests_running == len(running)
        assert stats.num_requests_waiting == len({e.request.request_id for e in self.open.values()}) - len(running)
        self._check_cache()

    def check_blocks(self) -> None:
        """1, 2, 3, 9 and that the oracle's sequences are the scheduler's; holds within a step, too."""
        scheduler = self.scheduler
        live = [*scheduler.running, *scheduler.waiting]
        begun = {k for k, e in self.open.items() if e.index == 0 or e.request.request_id in self.forked}
        assert {s.seq_id for s in live} == begun
        for sequence in live:
            assert sequence.token_ids == self.open[sequence.seq_id].tokens
            for group, table in zip(self.groups, sequence.block_tables, strict=bool(sequence.block_tables)):
                most = most_blocks(group.sliding_window, 0, sequence.num_tokens, self.block_size, self.budget)
                assert len(table.blocks) <= most, "a sequence holds more blocks than its window needs"
        self.blocks.check_integrity(live)
        used = [len(self._held(group)) for group in range(len(self.groups))]
        assert [pool.num_referenced for pool in self.blocks.pools] == used
        assert scheduler.stats().kv_cache_usage == max(
            n / group.num_blocks for n, group in zip(used, self.groups, strict=True)
        )
        assert scheduler.has_work or not any(used)

    def _check_cache(self) -> None:
        """5: what a cached block holds and its hash determine each other, on the host too."""
        if len(self._hash_of) > _MAX_HASHES:
            self._hash_of.clear()
            self._content_of.clear()
        tiers = self.blocks.tiers
        held = [[(self.kv[i][b][-1], h) for b, h in cached.items()] for i, cached in enumerate(self.cached_blocks())]
        held += [[(self.host_kv[i][b][-1], h) for h, b in tier.blocks.items()] for i, tier in enumerate(tiers)]
        for contents in held:
            for content, its_hash in contents:
                if content != POISON:
                    assert self._hash_of.setdefault(content, its_hash) == its_hash
                    assert self._content_of.setdefault(its_hash, content) == content

    # What holds amid a step

    def check_prefix(self, seq: Sequence, prefix: CachedPrefix) -> None:
        """A hit is the longest whose visible part is cached in every group, and is made of no other blocks.

        What is on the host counts only if copying it costs less than computing the tokens that it adds.
        """
        expected, size, costs = self.open[seq.seq_id], self.block_size, self.setup.swap_costs
        num_full = (len(expected.tokens) - 1) // size if self.is_hashing else 0
        hashes = expected.block_hashes(num_full, size)
        for num_blocks in range(num_full, -1, -1):
            found = self._prefix_of(hashes[:num_blocks])
            if found is not None and not any(found.swapped):
                break
        for num_more in range(num_full, num_blocks, -1) if costs is not None else ():
            longer = self._prefix_of(hashes[:num_more])
            if longer is not None:
                assert costs is not None
                copying = sum(len(n) * s for n, s in zip(longer.swapped, costs.in_s, strict=True))
                if costs.overhead_s + copying < (num_more - num_blocks) * size * costs.token_s:
                    found = longer
                else:
                    self.seen["recomputed by choice"] += 1
                break
        assert prefix == found

    def _prefix_of(self, hashes: list[bytes]) -> CachedPrefix | None:
        tables, swapped = [], []
        for group, (pool, tier) in enumerate(zip(self.blocks.pools, self.blocks.tiers, strict=True)):
            first = self._first_read(group, len(hashes) * self.block_size) // self.block_size
            blocks = [pool.cache.get(h) for h in hashes[first:]]
            lacking = [i for i, h in enumerate(hashes) if i >= first and blocks[i - first] is None]
            if any(hashes[i] not in tier for i in lacking):
                return None
            tables.append(BlockTable(first, [b for b in blocks if b is not None]))
            swapped.append(tuple(lacking))
        return CachedPrefix(num_blocks=len(hashes), tables=tuple(tables), swapped=tuple(swapped))

    def check_admission(self, seq: Sequence, prefix: CachedPrefix, fits: bool) -> None:
        """A sequence is admitted if, and only if, it can be computed whole from the blocks that are left."""
        start, end, lacks = prefix.num_blocks * self.block_size, seq.num_tokens, []
        for i, (group, table) in enumerate(zip(self.groups, prefix.tables, strict=True)):
            most = min(self._most(group, end), -(-end // self.block_size) - table.first)
            assert most >= most_blocks(group.sliding_window, start, end, self.block_size, self.budget)
            num_left = group.num_blocks - len(self._held(i).union(table.blocks))
            lacks.append(most - len(table.blocks) - num_left)
        assert fits == (max(lacks) <= 0)
        self.seen["hits amid a prefix"] += fits and any(table.first for table in prefix.tables)

    def check_refusal(self, seq: Sequence, num_tokens: int) -> None:
        """A reservation is refused only when a group lacks blocks."""
        end, lacks = -(-(seq.num_computed_tokens + num_tokens) // self.block_size), []
        for group, (pool, table) in enumerate(zip(self.blocks.pools, tables_of(seq), strict=True)):
            written = table.get(seq.num_computed_tokens // self.block_size)
            holders = sum(written in s.block_tables[group].blocks for s in self.scheduler.running)
            is_copied = written is not None and (holders > 1 or written in pool.cache)
            num_new = end - self._first_read(group, seq.num_computed_tokens) // self.block_size - len(table)
            lacks.append(num_new + is_copied - (self.groups[group].num_blocks - len(self._held(group))))
        assert max(lacks) > 0, "refused in vain"

    def check_batch(self, batch: ScheduledBatch, *, preempted: bool) -> None:
        """6, 8, and that each chunk is what its sequence has to compute next."""
        scheduler, chunks = self.scheduler, batch.chunks
        assert 1 <= batch.num_tokens <= self.budget
        live = sorted([*scheduler.running, *scheduler.waiting], key=lambda s: s.seq_id)
        assert [c.seq_id for c in chunks] == [s.seq_id for s in live[: len(chunks)]], "an older one was passed over"
        seats = [self._seats(self.open[s.seq_id]) for s in scheduler.running]
        assert sum(seats) <= self.setup.max_num_seqs
        for chunk, sequence in zip(chunks, live, strict=False):
            is_last = chunk is chunks[-1] and batch.num_tokens == self.budget
            self._check_chunk(chunk, sequence, may_be_cut=is_last)
        if batch.num_tokens < self.budget and len(chunks) < len(live) and not preempted:
            left_out = self.open[live[len(chunks)].seq_id]
            has_seats = sum(seats) + self._seats(left_out) <= self.setup.max_num_seqs
            lacks = [self._most(g, len(left_out.tokens)) - g.num_blocks + len(self._held(i)) for i, g in self._groups()]
            assert not has_seats or max(lacks) > 0, "a sequence waits in vain"

    def _check_chunk(self, chunk: ScheduledChunk, sequence: Sequence, *, may_be_cut: bool) -> None:
        expected, start, end = self.open[chunk.seq_id], chunk.start, chunk.start + len(chunk.token_ids)
        if expected.num_cached_tokens is None:
            expected.num_cached_tokens = start
            self.seen["hits"] += start > 0
        if expected.seed is None and chunk.sample_seed is not None:
            expected.seed = chunk.sample_seed
            siblings = [e.seed for e in self.open.values() if e.request is expected.request]
            assert siblings.count(expected.seed) == 1, "two sequences of a request draw the same tokens"
        assert start == sequence.num_computed_tokens
        assert chunk.token_ids == tuple(expected.tokens[start:end])
        assert start < end <= len(expected.tokens)
        assert chunk.sample_seed == (expected.seed if end == len(expected.tokens) else None)
        assert (chunk.position, chunk.params) == (end, expected.request.params)
        assert chunk.block_tables == tuple((t.first, tuple(t.blocks)) for t in sequence.block_tables)
        for i, (first, blocks) in enumerate(chunk.block_tables):
            assert first == self._first_read(i, start) // self.block_size, (
                "a block left the window, or leaves too early"
            )
            assert first + len(blocks) == -(-end // self.block_size)
        assert end == len(expected.tokens) or may_be_cut, "a chunk was cut with budget left"

    def _seats(self, sequence: Expected) -> int:
        unforked = sequence.request.request_id not in self.forked
        return sequence.request.params.n if unforked else 1

    def check_writes(
        self, batch: ScheduledBatch, before: dict[int, Tables], cached_before: list[dict[int, bytes]]
    ) -> None:
        """4: a block that is written in place has one owner and is not cached; any other was copied, and only then."""
        holders_before = [
            Counter(b for tables in before.values() for b in tables[i].values()) for i, _ in self._groups()
        ]
        holders_still: list[Counter[int]] = [Counter() for _ in self.groups]
        now = {s.seq_id: tables_of(s) for s in self.scheduler.running}
        for seq_id, tables in before.items():
            for i, old in enumerate(tables if seq_id in now else []):
                kept = [n for n, b in old.items() if now[seq_id][i].get(n) == b]
                holders_still[i].update(old[n] for n in kept)
                self.seen["blocks that left a window"] += sum(n < min(now[seq_id][i]) for n in old)
        copies = []
        for chunk in batch.chunks:
            first = chunk.start // self.block_size
            for i, old in enumerate(before.get(chunk.seq_id, ())):
                table = now[chunk.seq_id][i]
                assert all(b == old[n] for n, b in table.items() if n < first)
                if first not in old:
                    continue
                if table[first] == old[first]:
                    assert holders_still[i][old[first]] == 1
                    assert old[first] not in cached_before[i]
                else:
                    copies.append(BlockCopy(kind=CopyKind.WITHIN, group=i, source=old[first], destination=table[first]))
                    assert chunk.start % self.block_size, "nothing to copy"
                    assert holders_before[i][old[first]] > 1 or old[first] in cached_before[i]
        assert [c for c in batch.block_copies if c.kind is CopyKind.WITHIN] == copies
        self._check_swaps(batch, before, now, cached_before)

    def _check_swaps(
        self,
        batch: ScheduledBatch,
        before: dict[int, Tables],
        now: dict[int, Tables],
        cached_before: list[dict[int, bytes]],
    ) -> None:
        """What comes back belongs to a sequence that was admitted; what is evicted goes to the host if there is room.

        What goes there was cached before the step: no block does that the step has yet to compute.
        """
        for i, (tier, cached) in enumerate(zip(self.blocks.tiers, self.cached_blocks(), strict=True)):
            admitted = {b for seq_id, tables in now.items() if seq_id not in before for b in tables[i].values()}
            mine = [c for c in batch.block_copies if c.group == i]
            brought = [c.destination for c in mine if c.kind is CopyKind.IN]
            assert len(set(brought)) == len(brought)
            assert admitted.issuperset(brought)
            evicted = {h for b, h in cached_before[i].items() if cached.get(b) != h}
            pushed = [c.source for c in mine if c.kind is CopyKind.OUT]
            assert cached_before[i].keys() >= set(pushed)
            assert len(set(pushed)) == len(pushed), "evicted twice"
            is_full = len(tier.blocks) == tier.num_blocks
            assert is_full or tier.blocks.keys() >= evicted, "an evicted block was lost"
            self.seen["swapped out"] += len(pushed)
            self.seen["swapped in"] += len(brought)

    def check_published(self, batch: ScheduledBatch, may_check: list[bool]) -> None:
        """Every block that a step fills can be found, unless its twin was evicted or it may hold NaN."""
        for i, cached in enumerate(self.cached_blocks()):
            contents = {self.kv[i][block][-1] for block in cached}
            for chunk in batch.chunks if may_check[i] else ():
                slots, end = self.open[chunk.seq_id].slots, chunk.start + len(chunk.token_ids)
                filled = [t for t in range(chunk.start, end) if (t + 1) % self.block_size == 0]
                assert all(slots[t] in contents or POISON in contents for t in filled)

    def check_forgotten(self, hashes: dict[int, list[bytes]], deltas: list[SequenceDelta]) -> None:
        """No one can hit a block of a sequence that gave NaN, not even one that left its window."""
        for delta in deltas:
            if delta.error is not None:
                forgotten = hashes[int(delta.request_id) * MAX_N + delta.index]
                assert all(pool.cache.get(h) is None for pool in self.blocks.pools for h in forgotten)
                assert not any(h in tier for tier in self.blocks.tiers for h in forgotten)

    def cached_blocks(self) -> list[dict[int, bytes]]:
        return [dict(pool.cache.hashes) for pool in self.blocks.pools]

    def _held(self, group: int) -> set[int]:
        return set(itertools.chain(*(s.block_tables[group].blocks for s in self.scheduler.running)))

    def _first_read(self, group: int, position: int) -> int:
        return first_read(self.groups[group].sliding_window, position)

    def _most(self, group: CacheGroup, num_tokens: int) -> int:
        return blocks_per_sequence(group.sliding_window, num_tokens, self.block_size, self.budget)

    def _groups(self) -> Iterator[tuple[int, CacheGroup]]:
        return enumerate(self.groups)


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


def tables_of(seq: Sequence) -> Tables:
    """The blocks of a sequence as they are now."""
    return [dict(enumerate(table.blocks, table.first)) for table in seq.block_tables]
