"""A scheduler whose worker samples what it is told to; for the tests of this folder."""

from collections.abc import Callable, Sequence
from typing import Any

from fairlead.interface import SchedulingPolicy
from fairlead.request import EngineStats, FinishReason, Request, SamplingParams, SequenceDelta
from fairlead.scheduling.batch import SampledToken, ScheduledBatch
from fairlead.scheduling.block_manager import BlockManager, CacheGroup
from fairlead.scheduling.scheduler import Scheduler

EOS = 2
Outcome = tuple[FinishReason | None, int | str | None]


class Engine:
    """Steps are over before the next is scheduled, or else (`ahead`) after it is. `now_s` is the scheduler's clock."""

    def __init__(
        self,
        *,
        num_blocks: int = 100,
        windows: Sequence[int | None] = (None,),
        block_size: int = 4,
        caching: bool = True,
        max_num_seqs: int = 8,
        budget: int = 64,
        max_model_len: int = 64,
        max_chunk: int | None = None,
        policy: SchedulingPolicy | None = None,
        ahead: bool = False,
    ) -> None:
        groups = [CacheGroup(num_blocks=num_blocks, sliding_window=window) for window in windows]
        self.scheduler = Scheduler(
            BlockManager(groups, block_size, max_chunk=budget, enable_prefix_caching=caching),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            policy=policy,
            long_prefill_token_threshold=max_chunk,
            clock=lambda: self.now_s,
        )
        self.now_s = 0.0
        self.ahead, self.in_flight = ahead, ScheduledBatch(chunks=(), block_copies=())
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], Outcome] = {}
        self.deltas: list[SequenceDelta] = []

    def add(
        self, request_id: str, prompt: int | Sequence[int], *, salt: str = "", priority: int = 0, **params: Any
    ) -> None:
        """A prompt of that many tokens, or of those tokens."""
        token_ids = tuple(range(10, 10 + prompt)) if isinstance(prompt, int) else tuple(prompt)
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            params=SamplingParams(**params),
            eos_token_ids=(EOS,),
            cache_salt=salt,
            priority=priority,
        )
        self.scheduler.add(request, seed=len(self.tokens))

    def step(
        self, sample: Callable[[int], int | None] = lambda i: 100, during: Callable[[], None] | None = None
    ) -> ScheduledBatch:
        """One step; `sample` gets the place of a sequence among those that sample. Returns what was scheduled."""
        batch = self.scheduler.schedule()
        ending, self.in_flight = (self.in_flight, batch) if self.ahead else (batch, self.in_flight)
        if during is not None:
            during()
        num_samples = sum(c.sample_seed is not None for c in ending.chunks)
        self.deltas = self.scheduler.update(ending, [SampledToken(token_id=sample(i)) for i in range(num_samples)])
        for delta in self.deltas:
            self.tokens.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.ends[delta.request_id, delta.index] = (delta.finish_reason, delta.stop_reason)
        self.scheduler.check_integrity()
        return batch

    def run(self, max_steps: int = 1000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self.in_flight.chunks:
                assert self.stats.kv_cache_usage == 0
                return
            self.step()
        raise AssertionError(f"still at work after {max_steps} steps")

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats()


def starts(batch: ScheduledBatch) -> list[tuple[int, int]]:
    """(start, number of tokens) of each chunk."""
    return [(c.start, len(c.token_ids)) for c in batch.chunks]


def table(batch: ScheduledBatch, chunk: int) -> tuple[int, ...]:
    """The blocks of a chunk in its only group."""
    ((_, blocks),) = batch.chunks[chunk].block_tables
    return blocks
