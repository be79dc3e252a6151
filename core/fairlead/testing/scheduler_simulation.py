"""Drives a Scheduler with a null worker and an oracle of what every KV slot holds.

A tool for whoever changes the scheduler or the block manager; there is no model and no torch. The simulated worker
fills each slot with the identity of the token prefix (salt included) that it stands for, and every chunk is checked to
read exactly its own prefix, in a group with a sliding window the part of it that its queries see. Copy-on-write, prefix
hits within a step, blocks that leave a window, eviction, swapping to the host and back, preemption and cache resets are
right if, and only if, that holds. Models have one full group, one windowed group, or two groups, with host blocks or
without. All of it is checked after each rule; a violation is an AssertionError. One seed gives one trace; to see a seed
fail:

    python -m fairlead.testing.scheduler_simulation SEED NUM_STEPS
"""

import argparse
import hashlib
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Protocol

from fairlead.request import MAX_N, Request, SamplingParams
from fairlead.scheduling.batch import CopyKind, SampledToken
from fairlead.scheduling.block_manager import CacheGroup, blocks_per_sequence
from fairlead.scheduling.host_tier import SwapCosts
from fairlead.testing.scheduler_oracle import EOS, POISON, STOP_TOKEN, Expected, Flight, Oracle, Setup, tables_of

VOCAB_SIZE = 24
MAX_REQUESTS = 8  # in flight
GARBAGE = -2  # in a slot: what a step that failed left behind
KINDS = (  # of models: whether each group has a window
    (False,),
    (False,),
    (True,),
    (False, True),
    (False, True),
    (True, False),
    (True, True),
)


class Trace(Protocol):
    """Takes in everything that happens; a hashlib object will do."""

    def update(self, data: bytes, /) -> None: ...


def random_setup(rng: Random) -> Setup:
    """Small sizes, so that edges are common. A model has a full group, windowed ones, or both."""
    block_size = rng.choice((1, 2, 3, 4, 8, 16))
    max_model_len = rng.randint(2, 32)
    budget = rng.choice((1, 2, 3, 5, 8, 16, 64))
    has_host = rng.random() < 0.6

    def group(is_windowed: bool) -> CacheGroup:
        """A window within a block, or of any size up to one that never ends; a pool that may be as small as can be."""
        window = rng.choice((rng.randint(1, block_size), rng.randint(1, max_model_len + 1)))
        sliding_window = window if is_windowed else None
        most = blocks_per_sequence(sliding_window, max_model_len, block_size, budget)
        return CacheGroup(
            num_blocks=most + rng.choice((0, 0, 1, 2, 4) if has_host else (0, 0, 1, 2, 4, 8, 16)),
            sliding_window=sliding_window,
            num_host_blocks=rng.choice((0, 1, 3, 8, 100, 100)) if has_host else 0,
        )

    groups = tuple(map(group, rng.choice(KINDS)))
    return Setup(
        block_size=block_size,
        max_model_len=max_model_len,
        budget=budget,
        max_num_seqs=rng.randint(1, 8),
        caching=rng.random() < (0.6 if has_host else 0.8),
        groups=groups,
        swap_costs=random_costs(rng, len(groups)) if has_host else None,
        max_chunk=rng.choice((None, None, 1, 2, 4)),
        aging_s=rng.choice((None, None, 0.0, 1.0, 30.0)),
        is_async=rng.random() < 0.5,
    )


def random_costs(rng: Random, num_groups: int) -> SwapCosts:
    """Copies that are free, or that pay for some runs of blocks and not for others."""
    if rng.random() < 0.7:
        return SwapCosts(out_s=(0.0,) * num_groups, in_s=(0.0,) * num_groups, overhead_s=0.0, token_s=1.0)
    in_s = tuple(rng.choice((0.5, 1.0, 3.0, 8.0)) for _ in range(num_groups))
    return SwapCosts(out_s=in_s, in_s=in_s, overhead_s=rng.choice((0.0, 2.0, 8.0)), token_s=1.0)


class Simulation(Oracle):
    """A scheduler with a simulated worker. Each public method from `add` to `drain` is a rule; it checks all of it."""

    def __init__(self, rng: Random, trace: Trace | None = None, seen: Counter[str] | None = None) -> None:
        super().__init__(random_setup(rng), Counter() if seen is None else seen)
        self.trace = trace
        self.prompts = [[rng.randrange(2) for _ in range(self.setup.max_model_len)] for _ in range(2)]
        self.num_added = 0
        self.note("setup", self.setup)

    # Rules

    def add(self, rng: Random) -> None:
        """A request whose prompt shares a prefix with others."""
        if len({e.request.request_id for e in self.open.values()}) >= MAX_REQUESTS:
            return
        length = min(rng.randint(1, rng.choice((4, self.setup.max_model_len))), self.setup.max_model_len - 1)
        prompt = rng.choice(self.prompts)[:length]
        if rng.random() < 0.5:
            changed = rng.randrange(length)
            prompt = [*prompt[:changed], *(rng.randrange(2) for _ in range(length - changed))]
        request = Request(
            request_id=str(self.num_added),
            prompt_token_ids=tuple(prompt),
            params=SamplingParams(
                n=rng.randint(1, min(4, self.setup.max_num_seqs)) if rng.random() < 0.4 else 1,
                max_tokens=rng.choice((None, None, 1, 3, 20)),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=(STOP_TOKEN,) if rng.random() < 0.3 else (),
            ),
            eos_token_ids=(EOS,),
            cache_salt=rng.choice(("", "", "", "tenant")),
            priority=rng.randint(-2, 2),
        )
        self.note("add", request)
        self.now_s += rng.choice((0.0, 0.5, 5.0))
        self.scheduler.add(request, rng.getrandbits(64))
        for index in range(request.params.n):
            self.open[self.num_added * MAX_N + index] = sequence = Expected(request, index, not self.setup.caching)
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
            lost = [self.scheduler.schedule(), *([self.in_flight.batch] if self.in_flight else [])]
            for copy in [c for batch in lost for c in batch.block_copies[rng.randint(0, len(batch.block_copies)) :]]:
                kv = self.host_kv if copy.kind is CopyKind.OUT else self.kv
                kv[copy.group][copy.destination] = [GARBAGE] * self.block_size
            for chunk in [c for batch in lost for c in batch.chunks[rng.randint(0, len(batch.chunks)) :]]:
                for group_kv, (first, blocks) in zip(self.kv, chunk.block_tables, strict=True):
                    for block in blocks[chunk.start // self.block_size - first :]:
                        group_kv[block] = [GARBAGE] * self.block_size
            ended = self.scheduler.abort_all()
            assert sorted(ended) == sorted({e.request.request_id for e in self.open.values()})
            self.open.clear()
            self.in_flight = None
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
            self.check_blocks()

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
            self.check_blocks()

    def reset_cache(self, rng: Random) -> None:
        """The prefix cache is forgotten."""
        self.note("reset")
        self.blocks.reset_cache()
        assert not any(self.cached_blocks())
        assert not any(tier.blocks for tier in self.blocks.tiers)
        self.check_blocks()

    def drain(self, rng: Random) -> None:
        """Nothing new comes: everything ends within a known number of steps (8)."""
        # Whoever is first in line computes a token a step at least, and does so once for each time it starts over.
        bound = 2 + 2 * sum(3 * self.setup.max_model_len for _ in self.open)
        for _ in range(bound):
            self._step(rng)
        assert not self.open
        assert not self.scheduler.has_work
        assert self.in_flight is None
        self.seen["drains"] += 1

    # The simulated worker and front end

    def note(self, *what: object) -> None:
        if self.trace is not None:
            self.trace.update(repr(what).encode())

    def _step(self, rng: Random, *, nan: bool = False, during: Callable[[Random], None] | None = None) -> None:
        if not self.scheduler.has_work and self.in_flight is None:
            return
        before = {s.seq_id: tables_of(s) for s in self.scheduler.running}
        cached_before = self.cached_blocks()
        num_preemptions = self.scheduler.stats().num_preemptions
        batch = self.scheduler.schedule()
        self.check_batch(batch, before)
        self.check_writes(batch, before, cached_before)
        num_evicted = [cache.take_evicted() for cache in self.caches]
        if self.is_hashing:
            self.check_published(batch, before, [n == 0 for n in num_evicted])
        self.note(batch)
        self.seen["steps"] += 1
        self.seen["preemptions"] += self.scheduler.stats().num_preemptions - num_preemptions
        self.seen["copies"] += sum(copy.kind is CopyKind.WITHIN for copy in batch.block_copies)
        self.seen["evictions"] += sum(num_evicted)
        started = Flight(batch=batch, sequences={c.seq_id: self.open[c.seq_id] for c in batch.chunks})
        ending, self.in_flight = (self.in_flight, started) if self.setup.is_async else (started, None)
        if not batch.chunks:
            self.in_flight = None
        if during is not None:
            during(rng)
        if ending is not None:
            self._end(ending, rng.choice(ending.batch.chunks).seq_id if nan else None)
        self.check()

    def _end(self, flight: Flight, nan_seq_id: int | None) -> None:
        """The step runs, and the scheduler takes in what it sampled."""
        sampled = self._execute(flight, nan_seq_id)
        self.note(sampled)
        hashes = {s.seq_id: s.block_hashes for s in [*self.scheduler.running, *self.scheduler.waiting]}
        taking = [c.seq_id for c in flight.batch.chunks if c.seq_id in self.open and not self.open[c.seq_id].num_stale]
        samplers = [c.seq_id for c in flight.batch.chunks if c.sample_seed is not None]
        errors = [i for i, t in zip(samplers, sampled, strict=True) if t.token_id is None and i in taking]
        expected = self.expected_deltas(flight.batch, sampled)
        assert self.scheduler.update(flight.batch, sampled) == expected  # 7: one end each, and nothing after it
        self.check_forgotten(hashes, errors)

    def _execute(self, flight: Flight, nan_seq_id: int | None) -> list[SampledToken]:
        size, batch = self.block_size, flight.batch
        for copy in batch.block_copies:
            sources = self.host_kv if copy.kind is CopyKind.IN else self.kv
            destinations = self.host_kv if copy.kind is CopyKind.OUT else self.kv
            destinations[copy.group][copy.destination] = list(sources[copy.group][copy.source])
        for group, kv in enumerate(self.kv):
            written: set[tuple[int, int]] = set()
            for chunk in batch.chunks:
                first, blocks = chunk.block_tables[group]
                slots = flight.sequences[chunk.seq_id].slots
                for i in range(chunk.start, chunk.start + chunk.num_tokens):
                    block, offset = blocks[i // size - first], i % size
                    slot = slots[i] if i < len(slots) else GARBAGE  # its token never came to be known
                    kv[block][offset] = POISON if chunk.seq_id == nan_seq_id else slot
                    written.add((block, offset))
            assert len(written) == batch.num_tokens, "two tokens of a step in one slot"
        sampled = []
        for chunk in batch.chunks:
            sequence = self.open.get(chunk.seq_id)
            is_read = sequence is not None and not sequence.num_stale
            poisoned = [
                sequence is not None and is_read and self.reads_poison(chunk, sequence, group)
                for group in range(len(self.groups))
            ]
            if chunk.sample_seed is not None:
                token = (chunk.sample_seed * 0x2545F491 + chunk.position * 0x9E3779B1 >> 17) % VOCAB_SIZE
                sampled.append(SampledToken(token_id=None if any(poisoned) else token))
        return sampled


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


def simulate(seed: int, num_steps: int, trace: Trace | None = None) -> Counter[str]:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Simulate a scheduler; prints a digest of all that happened, and counts."
    )
    parser.add_argument("seed", type=int)
    parser.add_argument("num_steps", type=int)
    arguments, digest = parser.parse_args(), hashlib.sha256()
    happened = simulate(arguments.seed, arguments.num_steps, digest)
    print(digest.hexdigest(), dict(happened))
