"""Knows what each sequence has to be and what each KV slot has to hold: the oracle of `scheduler_simulation`.

The numbers in the docstrings are those of reliability.md, "Scheduler simulation".
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from fairlead.request import MAX_N, FinishReason, Request, Sequence, SequenceDelta
from fairlead.scheduling.batch import BlockCopy, CopyKind, SampledToken, ScheduledBatch, ScheduledChunk
from fairlead.scheduling.block_manager import BlockManager, CachedPrefix, CacheGroup, blocks_per_sequence
from fairlead.scheduling.host_tier import SwapCosts
from fairlead.scheduling.policy import Priority
from fairlead.scheduling.prefix_cache import block_hash, private_root_hash, root_hash
from fairlead.scheduling.scheduler import NAN_ERROR, Scheduler
from fairlead.testing.cache_oracle import CountedCache, Tables, check_swaps, expected_prefix, first_read, most_blocks

EOS, STOP_TOKEN = 23, 22
POISON = -1  # in a slot: NaN
_MAX_HASHES = 100_000  # that are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The engine that is simulated. `budget` is max_num_batched_tokens, `max_chunk` long_prefill_token_threshold.

    Requests are served by priority if `aging_s` is given. If `is_async`, steps are scheduled before their last is over.
    """

    block_size: int
    max_model_len: int
    budget: int
    max_num_seqs: int
    caching: bool
    groups: tuple[CacheGroup, ...]
    swap_costs: SwapCosts | None
    max_chunk: int | None
    aging_s: float | None
    is_async: bool


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
    num_pending: int = 0  # tokens of steps that are not over
    pending_row: int | None = None
    num_stale: int = 0  # of those, tokens that are to be thrown away
    is_shared: bool = False  # some of what it reads was computed by others
    is_alone: bool = False  # it may take nothing from the cache any more
    filled: int | None = None  # a full block that single tokens filled, and that is not known to be published yet

    @property
    def num_tokens(self) -> int:
        """Known and pending ones."""
        return len(self.tokens) + self.num_pending

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

    def can_admit(self, seq: Sequence, prefix: CachedPrefix, claimed: Seq[int] | None = None) -> bool:
        fits = super().can_admit(seq, prefix, claimed)
        self.oracle.check_admission(seq, prefix, fits)
        return fits

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        fits = super().reserve(seq, num_tokens)
        if not fits:
            self.oracle.check_refusal(seq, num_tokens)
        return fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step that has been scheduled, and whose sequences it computes."""

    batch: ScheduledBatch
    sequences: dict[int, Expected]


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
        self.caches = [CountedCache() for _ in self.groups]
        for pool, cache in zip(self.blocks.pools, self.caches, strict=True):
            pool.cache = cache
        self.is_hashing = setup.caching or setup.swap_costs is not None
        self.blocks.oracle = self
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=setup.max_model_len,
            policy=None if setup.aging_s is None else Priority(aging_s=setup.aging_s),
            long_prefill_token_threshold=setup.max_chunk,
            clock=lambda: self.now_s,
        )
        self.now_s = 0.0
        self.passed_over = (0, 0)  # who is first in line and waits, and for how many steps
        self.in_flight: Flight | None = None
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
            if sequence.num_stale:
                sequence.num_stale -= 1
                continue
            sequence.num_pending -= 1
            if token.token_id is None and sequence.is_shared:
                sequence.num_stale, sequence.num_pending = sequence.num_pending, 0
                sequence.is_shared, sequence.is_alone = False, True
                self.seen["starts over"] += 1
                continue
            self._fork(sequence, chunk.seq_id)
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

    def _fork(self, sequence: Expected, seq_id: int) -> None:
        if sequence.request.request_id not in self.forked:
            self.forked.add(sequence.request.request_id)
            self.seen["forks"] += sequence.request.params.n > 1
            is_running = any(s.seq_id == seq_id for s in self.scheduler.running)
            for sibling in self.open.values():
                if sibling.request is sequence.request and sibling is not sequence:
                    sibling.num_cached_tokens, sibling.is_shared = sequence.num_cached_tokens, is_running

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

    def reads_poison(self, chunk: ScheduledChunk, sequence: Expected, group: int) -> bool:
        """Asserts that each slot that a chunk reads holds its own prefix, or else NaN."""
        (first, blocks), end = chunk.block_tables[group], chunk.start + chunk.num_tokens
        low = self._first_read(group, chunk.start)
        base = first * self.block_size
        have = [slot for block in blocks for slot in self.kv[group][block]][low - base : end - base]
        want = sequence.slots[low:end]
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
                num_tokens = sequence.num_tokens + sequence.num_pending
                most = most_blocks(group.sliding_window, 0, num_tokens, self.block_size, self.budget)
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
        copies = self.in_flight.batch.block_copies if self.in_flight else ()
        for i, (kv, cached) in enumerate(zip(self.kv, self.cached_blocks(), strict=True)):
            in_flight = {b for c in self.in_flight.batch.chunks for b in c.block_tables[i][1]} if self.in_flight else ()
            arriving = {c.destination for c in copies if c.group == i and c.kind is CopyKind.OUT}
            held = [(h, kv[b][-1]) for b, h in cached.items() if b not in in_flight]
            on_host = self.blocks.tiers[i].blocks.items()
            for its_hash, content in held + [(h, self.host_kv[i][b][-1]) for h, b in on_host if b not in arriving]:
                if content != POISON:
                    assert self._hash_of.setdefault(content, its_hash) == its_hash
                    assert self._content_of.setdefault(its_hash, content) == content

    # What holds amid a step

    def check_prefix(self, seq: Sequence, prefix: CachedPrefix) -> None:
        """A hit is the longest whose visible part is cached in every group, and is made of no other blocks."""
        expected, size = self.open[seq.seq_id], self.block_size
        num_full = (len(expected.tokens) - 1) // size if self.is_hashing and not expected.is_alone else 0
        hashes = expected.block_hashes(num_full, size)
        assert prefix == expected_prefix(self.blocks, hashes, self.setup.swap_costs, self.seen)

    def check_admission(self, seq: Sequence, prefix: CachedPrefix, fits: bool) -> None:
        """A sequence is admitted if, and only if, it can be computed whole from the blocks that are left."""
        start, end, lacks = prefix.num_blocks * self.block_size, seq.num_tokens, []
        for i, (group, table) in enumerate(zip(self.groups, prefix.tables, strict=True)):
            most = min(self._most(group, end), -(-end // self.block_size) - table.first)
            assert most >= most_blocks(group.sliding_window, start, end, self.block_size, self.budget)
            num_left = group.num_blocks - len(self._held(i).union(table.blocks)) - self._claimed(i)
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

    def check_batch(self, batch: ScheduledBatch, before: Mapping[int, Tables]) -> None:
        """6, 8, and that each chunk is what its sequence has to compute next. `before` are those that ran before it."""
        scheduler, chunks = self.scheduler, batch.chunks
        assert batch.num_tokens <= self.budget
        seats = [self._seats(self.open[s.seq_id]) for s in scheduler.running]
        assert sum(seats) <= self.setup.max_num_seqs
        keys = {s.seq_id: s.key for s in [*scheduler.running, *scheduler.waiting]}
        stayed = [s for s in scheduler.running if s.seq_id in before]
        victims = [s for s in scheduler.waiting if s.seq_id in before]
        admitted = [s for s in scheduler.running if s.seq_id not in before]
        assert all(a.key < b.key for a in stayed for b in victims), "not the last one in line was preempted"
        assert all(a.key < b.key for a in admitted for b in scheduler.waiting), "one was passed over"
        going = [s for s in stayed if self._goes_on(self.open[s.seq_id])]
        num_going = len(chunks) - len(admitted)
        assert [c.seq_id for c in chunks] == [s.seq_id for s in [*going[:num_going], *admitted]]
        assert num_going == len(going) or batch.num_tokens == self.budget, "one of the running was passed over"
        if stayed and scheduler.waiting and scheduler.waiting[0].key < stayed[0].key:
            first = scheduler.waiting[0].seq_id
            self.passed_over = (first, self.passed_over[1] + 1 if self.passed_over[0] == first else 1)
            assert self.passed_over[1] <= self.setup.max_num_seqs, "the first in line waits for others"
        else:
            self.passed_over = (0, 0)
        left = self.budget
        for i, chunk in enumerate(chunks):
            behind = [s for s in stayed if s.key > keys[chunk.seq_id]] if i < num_going else []
            # Tokens are kept for the first new one in line, which may still find no memory once the others have theirs.
            new = [s for s in [*admitted, *scheduler.waiting] if s.seq_id not in before][: i < num_going]
            longest = self.setup.max_chunk or self.budget
            num_promised = sum(min(s.num_tokens, longest) for s in new if s.key < keys[chunk.seq_id])
            num_behind = len(behind) + num_promised + (len(victims) if i < num_going else 0)
            self._check_chunk(chunk, left - num_behind, left - len(behind), is_new=i >= num_going)
            left -= chunk.num_tokens
        self._take_pending(chunks)
        assert chunks or not scheduler.has_work or any(e.num_pending for e in self.open.values())
        if left and scheduler.waiting and not victims:
            left_out = self.open[scheduler.waiting[0].seq_id]
            has_seats = sum(seats) + self._seats(left_out) <= self.setup.max_num_seqs
            num_left = [g.num_blocks - len(self._held(i)) - self._claimed(i) for i, g in self._groups()]
            lacks = [
                self._most(g, len(left_out.tokens)) - n for (_, g), n in zip(self._groups(), num_left, strict=True)
            ]
            assert not has_seats or max(lacks) > 0, "a sequence waits in vain"

    def _goes_on(self, expected: Expected) -> bool:
        """Whether a sequence can take another step, given that some may not be over."""
        if not expected.num_pending:
            return True
        params = expected.request.params
        num_output = expected.num_output_tokens + expected.num_pending
        is_over = num_output == params.max_tokens or expected.num_tokens == self.setup.max_model_len
        return not is_over and self._seats(expected) == 1

    def _check_chunk(self, chunk: ScheduledChunk, least: int, most: int, *, is_new: bool) -> None:
        """`least` and `most`: what is left of the budget once everyone behind has got a token."""
        expected, start, end = self.open[chunk.seq_id], chunk.start, chunk.start + chunk.num_tokens
        sequence = next(s for s in self.scheduler.running if s.seq_id == chunk.seq_id)
        if expected.num_cached_tokens is None:
            expected.num_cached_tokens = start
            self.seen["hits"] += start > 0
        if is_new:
            expected.is_shared = start > 0
        if expected.seed is None and chunk.sample_seed is not None:
            expected.seed = chunk.sample_seed
            siblings = [e.seed for e in self.open.values() if e.request is expected.request]
            assert siblings.count(expected.seed) == 1, "two sequences of a request draw the same tokens"
        assert end == sequence.num_computed_tokens
        assert start < end <= expected.num_tokens
        if chunk.source_row is None:
            assert chunk.token_ids == tuple(expected.tokens[start:end])
            assert end <= len(expected.tokens)
        else:
            assert (chunk.token_ids, chunk.source_row, start) == ((), expected.pending_row, len(expected.tokens))
            self.seen["chunks ahead"] += 1
        assert chunk.sample_seed == (expected.seed if end == expected.num_tokens else None)
        assert (chunk.position, chunk.params) == (end, expected.request.params)
        assert chunk.block_tables == tuple((t.first, tuple(t.blocks)) for t in sequence.block_tables)
        for i, (first, blocks) in enumerate(chunk.block_tables):
            assert first == self._first_read(i, start) // self.block_size, (
                "a block left the window, or leaves too early"
            )
            assert first + len(blocks) == -(-end // self.block_size)
        wanted = min(expected.num_tokens - start, self.setup.max_chunk or self.budget)
        assert max(1, min(wanted, least)) <= end - start <= max(1, min(wanted, most)), (
            "a chunk is too short, or too long"
        )

    def _take_pending(self, chunks: Iterable[ScheduledChunk]) -> None:
        samplers = (chunk for chunk in chunks if chunk.sample_seed is not None)
        for row, chunk in enumerate(samplers):
            self.open[chunk.seq_id].num_pending += 1
            self.open[chunk.seq_id].pending_row = row

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
        check_swaps(batch, self.blocks, before, now, cached_before, self.seen)

    def check_published(self, batch: ScheduledBatch, before: Mapping[int, Tables], may_check: list[bool]) -> None:
        """Every block that a chunk of known tokens fills can be found at once, and one that single tokens have filled
        when the next block begins; unless it was evicted since, or has left the window and may be."""
        size = self.block_size
        for chunk in batch.chunks:
            expected, end = self.open[chunk.seq_id], chunk.start + chunk.num_tokens
            is_single = chunk.num_tokens == 1 and chunk.seq_id in before
            filled = [] if is_single else list(range(chunk.start // size, end // size))
            if expected.filled is not None and chunk.start == (expected.filled + 1) * size:
                filled.insert(0, expected.filled)
            hashes = expected.block_hashes(min(end, len(expected.tokens)) // size, size)
            for pool, may, (first, _) in zip(self.blocks.pools, may_check, chunk.block_tables, strict=True):
                for block in (b for b in filled if may and b >= first):
                    assert pool.cache.get(hashes[block]) is not None, "a full block cannot be found"
            expected.filled = end // size - 1 if is_single and end % size == 0 and all(may_check) else None
            is_known = end <= len(expected.tokens)
            if expected.filled is not None and is_known and self.blocks.pools[0].cache.get(hashes[-1]) is not None:
                expected.filled = None

    def check_forgotten(self, hashes: dict[int, list[bytes]], errors: Iterable[int]) -> None:
        """No one can hit a block of a sequence that gave NaN, not even one that left its window."""
        for its_hash in itertools.chain.from_iterable(hashes[seq_id] for seq_id in errors):
            for kv, pool, tier in zip(self.kv, self.blocks.pools, self.blocks.tiers, strict=True):
                block = pool.cache.get(its_hash)
                assert block is None or kv[block][-1] != POISON
                assert its_hash not in tier

    def cached_blocks(self) -> list[dict[int, bytes]]:
        return [dict(pool.cache.hashes) for pool in self.blocks.pools]

    def _claimed(self, group: int) -> int:
        """Blocks that those amid their known tokens still need."""
        return sum(
            min(self._most(self.groups[group], s.num_tokens), -(-s.num_tokens // self.block_size) - table.first)
            - len(table.blocks)
            for s in self.scheduler.running
            if s.num_computed_tokens < s.num_tokens
            for table in [s.block_tables[group]]
        )

    def _held(self, group: int) -> set[int]:
        return set(itertools.chain(*(s.block_tables[group].blocks for s in self.scheduler.running)))

    def _first_read(self, group: int, position: int) -> int:
        return first_read(self.groups[group].sliding_window, position)

    def _most(self, group: CacheGroup, num_tokens: int) -> int:
        return blocks_per_sequence(group.sliding_window, num_tokens, self.block_size, self.budget)

    def _groups(self) -> Iterator[tuple[int, CacheGroup]]:
        return enumerate(self.groups)


def tables_of(seq: Sequence) -> Tables:
    """The blocks of a sequence as they are now."""
    return [dict(enumerate(table.blocks, table.first)) for table in seq.block_tables]
