"""Scheduler and block manager under random rules, against an oracle that knows what every KV slot must hold.

There is no model. The simulated worker fills each slot with the identity of the token prefix (salt included) that it
stands for, and every chunk is checked to read exactly its own prefix: copy-on-write, prefix hits within a step,
eviction, preemption and cache resets are right if, and only if, that holds. The numbers in the comments are those of
reliability.md, "Scheduler simulation". One seed gives one trace; to see a seed fail alone:

    python tests/core/scheduling/test_scheduler_machine.py SEED NUM_STEPS
"""

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from fairlead.request import MAX_N, FinishReason, Request, SamplingParams, SequenceDelta
from fairlead.scheduling.batch import SampledToken, ScheduledBatch, ScheduledChunk
from fairlead.scheduling.block_manager import BlockManager
from fairlead.scheduling.scheduler import NAN_ERROR, Scheduler

FAILED_SEEDS: list[int] = []  # seeds of the plain driver that once failed; never removed

VOCAB_SIZE = 24
EOS, STOP_TOKEN = 23, 22
MAX_REQUESTS = 8  # in flight
MAX_HASHES = 100_000  # kept by the oracle
POISON = -1  # in a slot: NaN


@dataclass(slots=True)
class Expected:
    """What the oracle knows about a sequence that has not ended."""

    request: Request
    index: int
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # what its slots must hold: slots[i] is salt and tokens[: i + 1]
    seed: int | None = None
    num_cached_tokens: int | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt_token_ids)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.slots.append(hash((self.slots[-1] if self.slots else len(self.request.cache_salt), token)))


@dataclass
class Simulation:
    """A scheduler with a simulated worker. Each public method is a rule; all invariants are checked after each."""

    rng: Random
    trace: Any = None  # a hashlib object that is fed with everything that happens
    seen: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        rng = self.rng
        self.block_size = rng.choice((1, 2, 3, 4, 8, 16))
        self.max_model_len = rng.randint(2, 32)
        self.budget = rng.choice((1, 2, 3, 5, 8, 16, 64))
        self.max_num_seqs = rng.randint(1, 8)
        self.num_blocks = -(-self.max_model_len // self.block_size) + rng.choice((0, 0, 1, 2, 4, 8, 16))
        self.caching = rng.random() < 0.8
        blocks = BlockManager(self.num_blocks, self.block_size, enable_prefix_caching=self.caching)
        self.scheduler = Scheduler(
            blocks,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            max_model_len=self.max_model_len,
        )
        self.prompts = [[rng.randrange(2) for _ in range(self.max_model_len)] for _ in range(2)]
        self.kv = [[0] * self.block_size for _ in range(self.num_blocks)]
        self.open: dict[int, Expected] = {}  # by seq_id, not yet forked ones included
        self.forked: set[str] = set()
        self.hash_of: dict[int, bytes] = {}  # content of a full block's last slot -> hash, and back
        self.content_of: dict[bytes, int] = {}
        self.num_added = 0
        self.note("config", self.block_size, self.max_model_len, self.budget, self.max_num_seqs, self.num_blocks)

    # Rules

    def add(self, rng: Random) -> None:
        """A request whose prompt shares a prefix with others."""
        if len({e.request.request_id for e in self.open.values()}) >= MAX_REQUESTS:
            return
        length = min(rng.randint(1, rng.choice((4, self.max_model_len))), self.max_model_len - 1)
        prompt = rng.choice(self.prompts)[:length]
        if rng.random() < 0.5:
            changed = rng.randrange(length)
            prompt = [*prompt[:changed], *(rng.randrange(2) for _ in range(length - changed))]
        request = Request(
            request_id=str(self.num_added),
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(
                n=rng.randint(1, min(4, self.max_num_seqs)) if rng.random() < 0.4 else 1,
                max_tokens=rng.choice((None, None, 1, 3, 20)),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=(STOP_TOKEN,) if rng.random() < 0.3 else (),
            ),
            eos_token_ids=(EOS,),
            cache_salt=rng.choice(("", "", "", "tenant")),
        )
        self.note("add", request)
        self.scheduler.add(request, rng.getrandbits(64))
        for index in range(request.params.n):
            self.open[self.num_added * MAX_N + index] = sequence = Expected(request, index)
            for token in prompt:
                sequence.append(token)
        self.num_added += 1
        self.check()

    def step(self, rng: Random) -> None:
        """One step, undisturbed."""
        self._step(rng)

    def step_with_nan(self, rng: Random) -> None:
        """A step in which one sequence's keys, values and logits turn to NaN."""
        self._step(rng, nan=True)

    def step_with_abort(self, rng: Random) -> None:
        """A step during which a caller leaves."""
        self._step(rng, during=self.abort if rng.random() < 0.5 else self.abort_one)

    def step_with_reset(self, rng: Random) -> None:
        """A step during which the prefix cache is reset."""
        self._step(rng, during=self.reset_cache)

    def step_that_fails(self, rng: Random) -> None:
        """A step whose worker dies half-way."""
        if self.scheduler.has_work:
            batch = self.scheduler.schedule()
            for chunk in batch.chunks[rng.randint(0, len(batch.chunks)) :]:
                for block in chunk.block_table[chunk.start // self.block_size :]:
                    self.kv[block] = [POISON - 1] * self.block_size
            ended = self.scheduler.abort_all()
            assert ended == list(dict.fromkeys(e.request.request_id for e in self.open.values()))
            self.open.clear()
            self.seen["worker errors"] += 1
            self.note("failed", ended)
            self.check()

    def abort(self, rng: Random) -> None:
        """A caller leaves."""
        if self.open:
            request_id = rng.choice(list(self.open.values())).request.request_id
            self.note("abort", request_id)
            self.scheduler.abort(request_id)
            self.open = {k: e for k, e in self.open.items() if e.request.request_id != request_id}
            self.scheduler.abort(request_id)  # again: nothing happens
            self.seen["aborts"] += 1
            self._check_blocks()

    def abort_one(self, rng: Random) -> None:
        """A stop string ends one sequence of a request."""
        if self.open:
            seq_id = rng.choice(list(self.open))
            sequence = self.open[seq_id]
            self.note("abort", seq_id)
            self.scheduler.abort(sequence.request.request_id, sequence.index)
            if sequence.request.params.n == 1 or sequence.request.request_id in self.forked:
                del self.open[seq_id]
                self.seen["aborts of one"] += 1
            self._check_blocks()

    def reset_cache(self, rng: Random) -> None:
        """The prefix cache is forgotten."""
        self.note("reset")
        self.scheduler.blocks.reset_cache()
        self._check_blocks()

    def drain(self, rng: Random) -> None:
        """Nothing new comes: everything ends within a known number of steps (8)."""
        prefill = -(-self.max_model_len // self.budget)
        bound = sum(prefill + self.max_model_len - len(e.tokens) for e in self.open.values())
        for _ in range(bound):
            self._step(rng)
        assert not self.open
        assert not self.scheduler.has_work
        self.seen["drains"] += 1

    # The simulated worker and front end

    def note(self, *what: object) -> None:
        if self.trace is not None:
            self.trace.update(repr(what).encode())

    def _step(self, rng: Random, *, nan: bool = False, during: Callable[[Random], None] | None = None) -> None:
        if not self.scheduler.has_work:
            return
        before = {s.seq_id: tuple(s.block_table) for s in self.scheduler.running}
        cached_before = self._cached_blocks()
        num_preemptions = self.scheduler.stats().num_preemptions
        batch = self.scheduler.schedule()
        num_preempted = self.scheduler.stats().num_preemptions - num_preemptions
        self._check_batch(batch, preempted=num_preempted > 0)
        self._check_writes(batch, before, cached_before)
        nan_seq_id = rng.choice(batch.chunks).seq_id if nan else None
        sampled = self._execute(batch, nan_seq_id)
        num_evicted = len(cached_before.items() - self._cached_blocks().items())
        if self.caching and not num_evicted and nan_seq_id is None:
            self._check_published(batch)
        self.note(batch, sampled)
        if during is not None:
            during(rng)
        expected = self._expected_deltas(batch, sampled)
        assert self.scheduler.update(batch, sampled) == expected  # 7: one end each, and nothing after it
        self._check_forgotten(batch, expected)
        self.seen["steps"] += 1
        self.seen["preemptions"] += num_preempted
        self.seen["copies"] += len(batch.block_copies)
        self.seen["evictions"] += num_evicted
        self.check()

    def _execute(self, batch: ScheduledBatch, nan_seq_id: int | None) -> list[SampledToken]:
        size, kv = self.block_size, self.kv
        for source, destination in batch.block_copies:
            kv[destination] = list(kv[source])
        written: set[tuple[int, int]] = set()
        for chunk in batch.chunks:
            end = chunk.start + len(chunk.token_ids)
            slots = self.open[chunk.seq_id].slots
            for i in range(chunk.start, end):
                kv[chunk.block_table[i // size]][i % size] = POISON if chunk.seq_id == nan_seq_id else slots[i]
                written.add((chunk.block_table[i // size], i % size))
        assert len(written) == batch.num_tokens, "two tokens of a step in one slot"
        sampled = []
        for chunk in batch.chunks:
            poisoned = self._reads_poison(chunk)
            if chunk.sample_seed is not None:
                token = (chunk.sample_seed * 0x2545F491 + chunk.position * 0x9E3779B1 >> 17) % VOCAB_SIZE
                sampled.append(SampledToken(token_id=None if poisoned else token))
        return sampled

    def _reads_poison(self, chunk: ScheduledChunk) -> bool:
        """Asserts that each slot that a chunk reads holds its own prefix, or else NaN."""
        size, end = self.block_size, chunk.start + len(chunk.token_ids)
        want = self.open[chunk.seq_id].slots
        have = [slot for block in chunk.block_table for slot in self.kv[block]][:end]
        if have == want[:end]:
            return False
        assert len(have) == end
        for i in range(end):
            assert have[i] in (want[i], POISON), f"token {i} of {chunk} (block size {size}) reads what is not its own"
        return True

    def _expected_deltas(self, batch: ScheduledBatch, sampled: list[SampledToken]) -> list[SequenceDelta]:
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
        if sequence.num_output_tokens == params.max_tokens or len(sequence.tokens) == self.max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    # Invariants

    def check(self) -> None:
        """All that holds between steps."""
        self.scheduler.check_integrity()
        self._check_blocks()
        stats = self.scheduler.stats()
        running = {s.request.request_id for s in self.scheduler.running}
        assert stats.num_requests_running == len(running)
        assert stats.num_requests_waiting == len({e.request.request_id for e in self.open.values()}) - len(running)
        self._check_cache()

    def _check_blocks(self) -> None:
        """1, 2, 3, 9 and that the oracle's sequences are the scheduler's; holds within a step, too."""
        scheduler = self.scheduler
        live = [*scheduler.running, *scheduler.waiting]
        begun = {k for k, e in self.open.items() if e.index == 0 or e.request.request_id in self.forked}
        assert {s.seq_id for s in live} == begun
        for sequence in live:
            assert sequence.token_ids == self.open[sequence.seq_id].tokens
        scheduler.blocks.check_integrity(live)
        used = {block for s in scheduler.running for block in s.block_table}
        assert scheduler.blocks.num_referenced == len(used)
        assert scheduler.stats().kv_cache_usage == len(used) / self.num_blocks
        assert scheduler.has_work or not used

    def _check_cache(self) -> None:
        """5: what a cached block holds and its hash determine each other."""
        if len(self.hash_of) > MAX_HASHES:
            self.hash_of.clear()
            self.content_of.clear()
        for block, block_hash in self._cached_blocks().items():
            content = self.kv[block][-1]
            if content != POISON:
                assert self.hash_of.setdefault(content, block_hash) == block_hash
                assert self.content_of.setdefault(block_hash, content) == content

    def _check_published(self, batch: ScheduledBatch) -> None:
        """Every block that a step fills can be found, unless its twin was evicted or it may hold NaN."""
        cached = {self.kv[block][-1] for block in self._cached_blocks()}
        for chunk in batch.chunks:
            slots, end = self.open[chunk.seq_id].slots, chunk.start + len(chunk.token_ids)
            filled = [i for i in range(chunk.start, end) if (i + 1) % self.block_size == 0]
            assert all(slots[i] in cached or POISON in cached for i in filled)

    def _check_forgotten(self, batch: ScheduledBatch, deltas: list[SequenceDelta]) -> None:
        """No one can hit a block of a sequence that gave NaN."""
        failed = {int(d.request_id) * MAX_N + d.index for d in deltas if d.error is not None}
        tables = [chunk.block_table for chunk in batch.chunks if chunk.seq_id in failed]
        assert not self._cached_blocks().keys() & set(itertools.chain(*tables))

    def _cached_blocks(self) -> dict[int, bytes]:
        return dict(self.scheduler.blocks._cache._hash_by_block)

    def _check_batch(self, batch: ScheduledBatch, *, preempted: bool) -> None:
        """6, 8, and that each chunk is what its sequence has to compute next."""
        scheduler, chunks = self.scheduler, batch.chunks
        assert 1 <= batch.num_tokens <= self.budget
        live = sorted([*scheduler.running, *scheduler.waiting], key=lambda s: s.seq_id)
        assert [c.seq_id for c in chunks] == [s.seq_id for s in live[: len(chunks)]], "an older one was passed over"
        seats = [self._seats(self.open[s.seq_id]) for s in scheduler.running]
        assert sum(seats) <= self.max_num_seqs
        for chunk, sequence in zip(chunks, live, strict=False):
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
            assert chunk.block_table == tuple(sequence.block_table)
            assert len(chunk.block_table) == -(-end // self.block_size)
            is_last = chunk is chunks[-1] and batch.num_tokens == self.budget
            assert end == len(expected.tokens) or is_last, "a chunk was cut with budget left"
        if batch.num_tokens < self.budget and len(chunks) < len(live) and not preempted:
            left_out = self.open[live[len(chunks)].seq_id]
            has_seats = sum(seats) + self._seats(left_out) <= self.max_num_seqs
            num_free = self.num_blocks - len({b for s in scheduler.running for b in s.block_table})
            assert not has_seats or -(-len(left_out.tokens) // self.block_size) > num_free, "a sequence waits in vain"

    def _seats(self, sequence: Expected) -> int:
        unforked = sequence.request.request_id not in self.forked
        return sequence.request.params.n if unforked else 1

    def _check_writes(
        self, batch: ScheduledBatch, before: dict[int, tuple[int, ...]], cached_before: dict[int, bytes]
    ) -> None:
        """4: a block that is written in place has one owner and is not cached; any other was copied, and only then."""
        holders_before = Counter(block for table in before.values() for block in table)
        holders_still = Counter(
            block
            for s in self.scheduler.running
            for block, old in zip(s.block_table, before.get(s.seq_id, ()), strict=False)
            if block == old
        )
        copies = []
        for chunk in batch.chunks:
            first, table, old = chunk.start // self.block_size, chunk.block_table, before.get(chunk.seq_id, ())
            assert table[:first] == old[:first] or not old
            if first < len(old):
                if table[first] == old[first]:
                    assert holders_still[old[first]] == 1
                    assert old[first] not in cached_before
                else:
                    copies.append((old[first], table[first]))
                    assert chunk.start % self.block_size, "nothing to copy"
                    assert holders_before[old[first]] > 1 or old[first] in cached_before
        assert batch.block_copies == tuple(copies)


RULES: dict[Callable[[Simulation, Random], None], int] = {  # with their weights in the plain driver
    Simulation.add: 60,
    Simulation.step: 120,
    Simulation.step_with_abort: 8,
    Simulation.step_with_nan: 4,
    Simulation.step_with_reset: 2,
    Simulation.step_that_fails: 1,
    Simulation.abort: 4,
    Simulation.abort_one: 6,
    Simulation.reset_cache: 2,
    Simulation.drain: 1,
}


def simulate(seed: int, num_steps: int, trace: Any = None) -> Counter[str]:
    """The plain driver: `num_steps` steps over many engines; returns how often what happened."""
    rng = Random(seed)
    seen: Counter[str] = Counter()
    rules, weights = list(RULES), list(RULES.values())
    while seen["steps"] < num_steps:
        simulation = Simulation(rng, trace, seen)
        for apply in rng.choices(rules, weights, k=min(1000, 2 * num_steps)):
            apply(simulation, rng)
        simulation.drain(rng)
    return seen


class SchedulerMachine(RuleBasedStateMachine):
    """The same rules, in an order that Hypothesis chooses and shrinks."""

    @initialize(seed=st.integers(0, 1000))
    def start(self, seed: int) -> None:
        self.simulation = Simulation(Random(seed))

    @rule(apply=st.sampled_from(list(RULES)), seed=st.integers(0, 1000))
    def apply(self, apply: Callable[[Simulation, Random], None], seed: int) -> None:
        apply(self.simulation, Random(seed))

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain(Random(0))


def test_hypothesis_finds_no_violation(count: Callable[..., int]) -> None:
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(max_examples=count(150, full=10_000), deadline=None, report_multiple_bugs=False),
    )


def test_a_long_run_has_no_violation_and_sees_everything(count: Callable[..., int]) -> None:
    num_steps = count(100_000, full=1_000_000)
    for seed in [*FAILED_SEEDS, *range(count(1, full=20))]:
        seen = simulate(seed, num_steps)
        for what in ("preemptions", "hits", "evictions", "copies", "forks", "aborts", "aborts of one", "worker errors"):
            assert seen[what] > num_steps / 500, f"{what} hardly happened: {seen}"
        for reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR):
            assert seen[reason.value] > num_steps / 500, seen


def test_one_seed_gives_one_trace() -> None:
    trace, other_trace = hashlib.sha256(), hashlib.sha256()
    simulate(7, 2_000, trace)
    simulate(8, 2_000, other_trace)
    assert trace.digest() != other_trace.digest()
    for hash_seed in ("0", "1"):  # no order of a set may show
        again = subprocess.run(
            [sys.executable, __file__, "7", "2000"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert again.stdout.split()[0] == trace.hexdigest()


if __name__ == "__main__":
    digest = hashlib.sha256()
    happened = simulate(int(sys.argv[1]), int(sys.argv[2]), digest)
    print(digest.hexdigest(), dict(happened))
