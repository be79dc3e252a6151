"""Continuous batching in one loop.

There is no prefill phase and no decode phase. Each sequence has `num_computed_tokens`, and a step hands it tokens
until it has caught up with `num_tokens`; chunked prefill, prefix caching and preemption by recompute follow from it.

Order of service is order of arrival (`seq_id`), and the newest one is preempted first, so all that wait are newer than
all that run. The oldest sequence gets tokens in every step and is never preempted, so every one of them ends. Among the
running, only the newest can be amid its prompt: it took what the budget left over, so none was admitted behind it.
Source: Yu et al., "Orca" (OSDI 2022), section 3; Kwon et al., "PagedAttention" (SOSP 2023), section 4.5.
"""

import bisect
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from fairlead.request import (
    MAX_N,
    EngineStats,
    FinishReason,
    Request,
    Sequence,
    SequenceDelta,
    SequenceStatus,
    TokenLogprobs,
)
from fairlead.scheduling.batch import ChunkExtras, SampleContext, SampledToken, ScheduledBatch, ScheduledChunk
from fairlead.scheduling.block_manager import BlockManager

_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the seeds of a request differ
NAN_ERROR = "the model's logits were not a number"


@dataclass(slots=True, kw_only=True)
class _Step:
    """A batch in the making."""

    budget: int
    chunks: list[ScheduledChunk] = field(default_factory=list)
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    preempted: bool = False


class Scheduler:
    """Owns the queues. `schedule` picks the next step, `update` takes in what it sampled."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: list[Sequence] = []  # sorted by seq_id
        self.running: list[Sequence] = []  # sorted by seq_id
        self._requests: dict[str, list[Sequence]] = {}
        self._live: dict[int, Sequence] = {}
        self._started: list[str] = []
        self._num_added = self._num_scheduled = 0
        self._num_preemptions = self._num_prompt = self._num_cached = self._num_generated = 0
        self._num_queries = self._num_hits = self._num_nan = self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request, seed: int, output_token_ids: tuple[int, ...] = ()) -> None:
        """Queues a request; its other sequences fork off the first one once the prompt is computed.

        A request that has `output_token_ids` already goes on behind them, as after a preemption.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is in use")
        seq = Sequence(
            seq_id=self._num_added * MAX_N,
            request=request,
            index=0,
            seed=seed,
            token_ids=[*request.prompt_token_ids, *output_token_ids],
            num_cached_tokens=0 if output_token_ids else None,
        )
        self._num_added += 1
        self._requests[request.request_id] = [seq]
        self._live[seq.seq_id] = seq
        self.waiting.append(seq)

    def find_sequence(self, seq_id: int) -> Sequence | None:
        """The sequence of a chunk, if it has not ended."""
        return self._live.get(seq_id)

    def has_request(self, request_id: str) -> bool:
        """Whether a request has sequences that have not ended."""
        return request_id in self._requests

    def take_started(self) -> list[str]:
        """Requests that were scheduled for the first time since the last call."""
        started, self._started = self._started, []
        return started

    def schedule(self) -> ScheduledBatch:
        """Picks the next step: first the running sequences, then, memory and budget permitting, waiting ones."""
        step = _Step(budget=self.max_num_batched_tokens)
        self._continue_running(step)
        if not step.preempted:
            self._admit_waiting(step)
        self._num_steps += 1
        self._num_scheduled += self.max_num_batched_tokens - step.budget
        assert step.chunks or not self.has_work, "there is work, but no sequence could be scheduled"
        return ScheduledBatch(chunks=tuple(step.chunks), block_copies=tuple(step.copies))

    def update(
        self,
        batch: ScheduledBatch,
        sampled: Seq[SampledToken],
        prompt_logprobs: Mapping[int, Seq[TokenLogprobs]] | None = None,
    ) -> list[SequenceDelta]:
        """Advances the sequences of a step; `sampled` has one entry per chunk that has a sample_seed, in order.

        Sequences that end give their blocks back. Those aborted since `schedule` are passed over.
        """
        deltas: list[SequenceDelta] = []
        tokens = iter(sampled)
        for chunk in batch.chunks:
            token = next(tokens) if chunk.sample_seed is not None else None
            seq = self._live.get(chunk.seq_id)
            if seq is None:
                continue
            seq.num_computed_tokens = chunk.start + len(chunk.token_ids)
            if chunk.extras is not None and seq.prompt_logprobs is not None and prompt_logprobs is not None:
                seq.prompt_logprobs += prompt_logprobs.get(seq.seq_id, ())
            if token is not None:
                if seq.num_output_tokens == 0 and seq.index == 0:
                    self._fork(seq)
                deltas.append(self._append(seq, token))
        return deltas

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its sequences, and frees its blocks; does nothing if it has ended already.

        Until the prompt of a request with several is computed it has no single sequences: only the whole can be ended.
        """
        for seq in list(self._requests.get(request_id, ())):
            if index is None or (seq.index == index and _seats(seq) == 1):
                self._finish(seq, FinishReason.ABORT)

    def abort_all(self) -> list[str]:
        """Ends every request and forgets the cached prefixes (a failed step may have published blocks in vain)."""
        request_ids = list(self._requests)
        for request_id in request_ids:
            self.abort(request_id)
        self.blocks.reset_cache()
        return request_ids

    def stats(self) -> EngineStats:
        """Counters and gauges as of now; requests (not sequences) are counted."""
        running = {s.request.request_id for s in self.running}
        return EngineStats(
            num_requests_running=len(running),
            num_requests_waiting=len(self._requests) - len(running),
            kv_cache_usage=self.blocks.usage,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt,
            num_cached_prompt_tokens=self._num_cached,
            num_generation_tokens=self._num_generated,
            num_prefix_queries=self._num_queries,
            num_prefix_hits=self._num_hits,
            num_nan_sequences=self._num_nan,
            num_steps=self._num_steps,
            num_scheduled_tokens=self._num_scheduled,
        )

    def check_integrity(self) -> None:
        """Asserts the invariants of queues and blocks; for tests and for an idle engine."""
        assert all(a.seq_id < b.seq_id for a, b in itertools.pairwise([*self.running, *self.waiting])), "out of order"
        assert all(s.status is SequenceStatus.RUNNING for s in self.running)
        assert all(s.status is SequenceStatus.WAITING for s in self.waiting)
        assert all(not s.block_tables and s.num_computed_tokens == 0 for s in self.waiting)
        assert all(s.num_tokens - s.num_computed_tokens == 1 for s in self.running[:-1]), "a second one amid its prompt"
        assert sorted(self._live) == sorted(s.seq_id for s in [*self.waiting, *self.running])
        assert sum(map(len, self._requests.values())) == len(self._live)
        assert self._num_seats() <= self.max_num_seqs
        for seq in self.running:
            assert seq.num_computed_tokens < seq.num_tokens <= self.max_model_len
            assert all(t.end >= self.blocks.num_blocks_for(seq.num_computed_tokens) for t in seq.block_tables)
        self.blocks.check_integrity(self._live.values())

    def _continue_running(self, step: _Step) -> None:
        i = 0
        while i < len(self.running) and step.budget > 0:
            seq = self.running[i]
            num_tokens = min(seq.num_tokens - seq.num_computed_tokens, step.budget)
            copies = self.blocks.reserve(seq, num_tokens)
            if copies is None:
                self._preempt_newest()
                step.preempted = True
            else:
                self._schedule_chunk(step, seq, num_tokens, copies)
                i += 1

    def _admit_waiting(self, step: _Step) -> None:
        seats = self.max_num_seqs - self._num_seats()
        while self.waiting and step.budget > 0:
            seq = self.waiting[0]
            if _seats(seq) > seats:
                return
            prefix = self.blocks.cached_prefix(seq)
            if not self.blocks.can_admit(seq, prefix):
                return
            self.waiting.pop(0)
            self.blocks.attach(seq, prefix)
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = seq.num_computed_tokens
                self._started.append(seq.request.request_id)
                self._num_queries += seq.num_prompt_tokens
                self._num_hits += seq.num_computed_tokens
            num_tokens = min(seq.num_tokens - seq.num_computed_tokens, step.budget)
            copies = self.blocks.reserve(seq, num_tokens)
            assert copies is not None
            self._enter_running(seq)
            self._schedule_chunk(step, seq, num_tokens, copies)
            seats -= _seats(seq)

    def _schedule_chunk(self, step: _Step, seq: Sequence, num_tokens: int, copies: list[tuple[int, int, int]]) -> None:
        start = seq.num_computed_tokens
        end = start + num_tokens
        step.budget -= num_tokens
        step.copies += copies
        step.chunks.append(
            ScheduledChunk(
                seq_id=seq.seq_id,
                token_ids=tuple(seq.token_ids[start:end]),
                start=start,
                block_tables=tuple((t.first, tuple(t.blocks)) for t in seq.block_tables),
                params=seq.request.params,
                sample_seed=seq.seed if end == seq.num_tokens else None,
                position=end,
                extras=None if seq.is_plain else _extras(seq, start, end),
            )
        )

    def _preempt_newest(self) -> None:
        seq = self.running.pop()
        self.blocks.free(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.insert(0, seq)
        self._num_preemptions += 1

    def _fork(self, parent: Sequence) -> None:
        """Starts the other sequences of a request whose prompt has just been computed.

        Each recomputes the last prompt token to draw its own first token; all earlier ones are shared.
        """
        self._num_prompt += parent.num_prompt_tokens
        self._num_cached += parent.num_cached_tokens or 0
        for index in range(1, parent.request.params.num_sequences):
            child = Sequence(
                seq_id=parent.seq_id + index,
                request=parent.request,
                index=index,
                seed=(parent.seed + index * _SEED_STEP) % 2**64,
                token_ids=list(parent.request.prompt_token_ids),
                num_computed_tokens=parent.num_prompt_tokens - 1,
                num_cached_tokens=parent.num_cached_tokens,
            )
            self.blocks.fork(parent, child)
            self._requests[parent.request.request_id].append(child)
            self._live[child.seq_id] = child
            self._enter_running(child)

    def _enter_running(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        bisect.insort(self.running, seq, key=lambda s: s.seq_id)

    def _append(self, seq: Sequence, token: SampledToken) -> SequenceDelta:
        if token.error is not None:
            return self._finish(seq, FinishReason.ERROR, error=token.error)
        if token.token_id is None:
            self._num_nan += 1
            self.blocks.unpublish(seq)
            return self._finish(seq, FinishReason.ERROR, error=NAN_ERROR)
        seq.token_ids.append(token.token_id)
        self._num_generated += 1
        params = seq.request.params
        logprobs = () if token.logprobs is None else (token.logprobs,)
        reason: FinishReason | None = None
        stop_reason: int | None = None
        if not params.ignore_eos and token.token_id in seq.request.eos_token_ids:
            reason = FinishReason.STOP
        elif token.token_id in params.stop_token_ids:
            reason, stop_reason = FinishReason.STOP, token.token_id
        elif token.ends_sequence:
            reason = FinishReason.STOP
        elif seq.num_output_tokens == params.max_tokens or seq.num_tokens == self.max_model_len:
            reason = FinishReason.LENGTH
        if reason is None:
            return _delta(seq, (token.token_id,), logprobs)
        return self._finish(seq, reason, stop_reason, (token.token_id,), logprobs)

    def _finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        stop_reason: int | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        error: str | None = None,
    ) -> SequenceDelta:
        (self.running if seq.status is SequenceStatus.RUNNING else self.waiting).remove(seq)
        self.blocks.free(seq)
        seq.status, seq.finish_reason, seq.stop_reason = SequenceStatus.FINISHED, reason, stop_reason
        del self._live[seq.seq_id]
        siblings = self._requests[seq.request.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._requests[seq.request.request_id]
        return _delta(seq, token_ids, logprobs, error)

    def _num_seats(self) -> int:
        return sum(map(_seats, self.running))


def _seats(seq: Sequence) -> int:
    """Places that a sequence takes among the running: its own, and those of the siblings that it will fork."""
    forks_later = seq.index == 0 and seq.num_output_tokens == 0
    return seq.request.params.num_sequences if forks_later else 1


def _extras(seq: Sequence, start: int, end: int) -> ChunkExtras:
    request = seq.request
    is_edited = request.params.edits_logits and end == seq.num_tokens
    prompt_row, prompt_targets = 0, request.prompt_token_ids[:0]
    if seq.prompt_logprobs is not None:
        first = max(start, len(seq.prompt_logprobs))  # after a preemption, some are there already
        prompt_row, prompt_targets = first - start, request.prompt_token_ids[first + 1 : end + 1]
    return ChunkExtras(
        num_logprobs=request.num_beam_candidates or request.params.num_engine_logprobs,
        is_beam=request.num_beam_candidates > 0,
        context=SampleContext(request=request, token_ids=tuple(seq.token_ids)) if is_edited else None,
        prompt_targets=prompt_targets,
        prompt_row=prompt_row,
    )


def _delta(
    seq: Sequence, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprobs, ...], error: str | None = None
) -> SequenceDelta:
    prompt_logprobs, seq.prompt_logprobs = tuple(seq.prompt_logprobs or ()), None
    return SequenceDelta(
        request_id=seq.request.request_id,
        index=seq.index,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
        num_cached_tokens=seq.num_cached_tokens or 0,
        error=error,
    )
