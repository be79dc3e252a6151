"""Continuous batching in one loop.

There is no prefill phase and no decode phase. Each sequence has `num_computed_tokens`, and a step hands it tokens
until it has caught up with `num_tokens`; chunked prefill, prefix caching and preemption by recompute follow from it.

Order of service is by `key`: what the policy makes of a request, then order of arrival. Keys never change, so that the
first in line gets tokens in every step, is never preempted, and every sequence comes to be the first. The last one in
line is preempted first. A chunk of a prompt leaves a token of the budget to everyone who runs behind it.

A step may be scheduled while the one before it still runs. The tokens that one samples are then `num_pending`; a
sequence whose next token cannot be its last goes on with a chunk that takes the pending token where the worker has it
(`ScheduledChunk.source_row`). If that token turns out to end the sequence, the chunk was in vain: steps run in order,
so it can only write where nobody reads, and what it samples is passed over.
Source: Yu et al., "Orca" (OSDI 2022), section 3; Kwon et al., "PagedAttention" (SOSP 2023), section 4.5.
"""

import bisect
import itertools
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from fairlead.interface import QueuedRequest, SchedulingPolicy
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
from fairlead.scheduling.batch import (
    BatchDraft,
    SampleContext,
    SampledToken,
    ScheduledBatch,
    ScheduledChunk,
    chunk_extras,
    sequence_delta,
)
from fairlead.scheduling.block_manager import BlockManager
from fairlead.scheduling.policy import FirstComeFirstServed

_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so that the seeds of a request differ
NAN_ERROR = "the model's logits were not a number"


class Scheduler:
    """Owns the queues. `schedule` picks the next step, `update` takes in what it sampled.

    A prompt gets at most `long_prefill_token_threshold` tokens of a step, if that is given. `clock` (seconds) tells the
    policy when a request arrived.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: SchedulingPolicy | None = None,
        long_prefill_token_threshold: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: list[Sequence] = []  # sorted by key
        self.running: list[Sequence] = []  # sorted by key
        self._policy, self._clock = policy or FirstComeFirstServed(), clock
        self._max_chunk = long_prefill_token_threshold or max_num_batched_tokens
        self._requests: dict[str, list[Sequence]] = {}
        self._live: dict[int, Sequence] = {}
        self._started: list[str] = []
        self._num_seats = 0  # taken by the running
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
        seq_id = self._num_added * MAX_N
        num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        max_num_tokens = self.max_model_len
        if request.num_beam_candidates:  # a beam's step is one token
            max_num_tokens = num_prompt_tokens + len(output_token_ids) + 1
        elif max_tokens is not None:
            max_num_tokens = min(max_num_tokens, num_prompt_tokens + max_tokens)
        seq = Sequence(
            seq_id=seq_id,
            request=request,
            index=0,
            seed=seed,
            key=(self._policy.key(self._queued(request)), seq_id),
            max_num_tokens=max_num_tokens,
            token_ids=[*request.prompt_token_ids, *output_token_ids],
            num_seats=1 if output_token_ids else request.params.num_sequences,
            has_forked=bool(output_token_ids),
            num_cached_tokens=0 if output_token_ids else None,
        )
        self._num_added += 1
        self._requests[request.request_id] = [seq]
        self._live[seq_id] = seq
        bisect.insort(self.waiting, seq, key=_key)

    def find_sequence(self, seq_id: int) -> Sequence | None:
        """The sequence of a chunk, if it has not ended."""
        return self._live.get(seq_id)

    def has_request(self, request_id: str) -> bool:
        """Whether a request has sequences that have not ended."""
        return request_id in self._requests

    def take_started(self) -> list[str]:
        """Requests that the latest step is the first of; each is told once."""
        started, self._started = self._started, []
        return started

    def schedule(self) -> ScheduledBatch:
        """Picks the next step: first the running sequences, then, memory and budget permitting, waiting ones.

        It has no chunks if there is no work, or if all of it waits for tokens of a step that still runs.
        """
        self._started = []
        step = BatchDraft(budget=self.max_num_batched_tokens)
        self._make_way(step)
        self._continue_running(step)
        if self.waiting and not step.lacks_memory:
            self._admit_waiting(step)
        self._num_steps += bool(step.chunks)
        self._num_scheduled += self.max_num_batched_tokens - step.budget
        assert step.chunks or not self.has_work or any(s.num_pending for s in self.running), "nothing can be scheduled"
        return ScheduledBatch(
            chunks=tuple(step.chunks), block_copies=self.blocks.take_copies(), edits_logits=step.edits_logits
        )

    def sample_contexts(self, batch: ScheduledBatch) -> dict[int, SampleContext]:
        """What precedes the tokens of a step whose params edit their logits, by place among the sampled ones.

        To be asked for once the step before is over: all tokens before the sampled ones must be known.
        """
        if not batch.edits_logits:
            return {}
        samplers = enumerate(chunk for chunk in batch.chunks if chunk.sample_seed is not None)
        found = ((row, self._live.get(chunk.seq_id)) for row, chunk in samplers if chunk.params.edits_logits)
        return {
            row: SampleContext(request=seq.request, token_ids=tuple(seq.token_ids))
            for row, seq in found
            if seq is not None and not seq.num_stale
        }

    def update(
        self,
        batch: ScheduledBatch,
        sampled: Seq[SampledToken],
        prompt_logprobs: Mapping[int, Seq[TokenLogprobs]] | None = None,
    ) -> list[SequenceDelta]:
        """Takes in what a step sampled: one entry per chunk that has a sample_seed, in order. Steps come in order.

        Sequences that end give their blocks back. Those aborted since `schedule` are passed over.
        """
        deltas: list[SequenceDelta] = []
        live, row, num_failed = self._live, 0, 0
        for chunk in batch.chunks:
            seq, extras = live.get(chunk.seq_id), chunk.extras
            if extras is not None and prompt_logprobs and seq is not None and seq.prompt_logprobs is not None:
                seq.prompt_logprobs += prompt_logprobs.get(seq.seq_id, ())
            if chunk.sample_seed is None:
                continue
            token = sampled[row]
            row += 1
            if seq is None:
                continue
            if seq.num_stale:
                seq.num_stale -= 1
                continue
            seq.num_pending -= 1
            token_id = token.token_id
            if token_id is None and token.error is None and seq.has_shared_context:
                self._start_over(seq)
                continue
            if not seq.has_forked:
                self._fork(seq)
            if token_id is None:
                deltas.append(self._fail(seq, token.error))
                num_failed += 1
                continue
            seq.token_ids.append(token_id)
            if token_id in seq.stop_ids or token.ends_sequence or len(seq.token_ids) == seq.max_num_tokens:
                deltas.append(self._stop(seq, token, token_id))
            elif extras is None and token.logprobs is None:
                deltas.append(
                    SequenceDelta(
                        request_id=seq.request.request_id,
                        index=seq.index,
                        token_ids=(token_id,),
                        num_cached_tokens=seq.num_cached_tokens or 0,
                    )
                )
            else:
                deltas.append(sequence_delta(seq, (token_id,), token.logprobs))
        self._num_generated += len(deltas) - num_failed
        return deltas

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one of its sequences, and frees its blocks; does nothing if it has ended already.

        Until the prompt of a request with several is computed it has no single sequences: only the whole can be ended.
        """
        for seq in list(self._requests.get(request_id, ())):
            if index is None or (seq.index == index and seq.num_seats == 1):
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
            num_blocks_swapped_out=self.blocks.num_swapped_out,
            num_blocks_swapped_in=self.blocks.num_swapped_in,
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
        for queue, status in ((self.running, SequenceStatus.RUNNING), (self.waiting, SequenceStatus.WAITING)):
            assert all(a.key < b.key for a, b in itertools.pairwise(queue)), "out of order"
            assert all(s.status is status for s in queue)
        assert all(not s.block_tables and s.num_computed_tokens == 0 for s in self.waiting)
        assert sorted(self._live) == sorted(s.seq_id for s in [*self.waiting, *self.running])
        assert sum(map(len, self._requests.values())) == len(self._live)
        assert self._num_seats == sum(s.num_seats for s in self.running) <= self.max_num_seqs
        for seq in self.running:
            assert seq.num_computed_tokens < seq.num_tokens + seq.num_pending <= seq.max_num_tokens
            assert all(t.end >= self.blocks.num_blocks_for(seq.num_computed_tokens) for t in seq.block_tables)
        self.blocks.check_integrity(self._live.values())

    def _queued(self, request: Request) -> QueuedRequest:
        return QueuedRequest(
            arrival_s=self._clock(),
            priority=request.priority,
            num_prompt_tokens=len(request.prompt_token_ids),
            max_tokens=request.params.max_tokens,
            cache_salt=request.cache_salt,
        )

    def _make_way(self, step: BatchDraft) -> None:
        """Preempts running sequences for a waiting one that goes before them and lacks a seat, a token or memory."""
        while self.waiting and self.running and self.waiting[0].key < self.running[-1].key:
            first = self.waiting[0]
            has_seats = self._num_seats + first.num_seats <= self.max_num_seqs and len(self.running) < step.budget
            prefix, claimed = self.blocks.cached_prefix(first), self.blocks.num_claimed(self.running)
            if has_seats and self.blocks.can_admit(first, prefix, claimed):
                num_tokens = first.num_tokens - prefix.num_blocks * self.blocks.block_size
                step.promised = (first.key, min(num_tokens, self._max_chunk))
                return
            step.displaced.append(self._preempt_last())

    def _continue_running(self, step: BatchDraft) -> None:
        """Hands tokens to the running sequences.

        Nearly all of them decode: one token each, into blocks that they have. Those are dealt with here, for a call
        per sequence would cost a quarter more in a large batch.
        """
        for seq in self.running:  # which may lose its last ones meanwhile
            if step.budget <= 0:
                return
            start, num_pending = seq.num_computed_tokens, seq.num_pending
            end = start + 1
            is_last = end == len(seq.token_ids) + num_pending
            if is_last and num_pending and (seq.num_seats > 1 or end >= seq.max_num_tokens):
                continue  # it forks, or ends, before it goes on
            if not is_last or start >= seq.quiet_until:
                self._extend(step, seq)
                continue
            step.chunks.append(
                ScheduledChunk(
                    seq_id=seq.seq_id,
                    token_ids=() if num_pending else (seq.token_ids[start],),
                    start=start,
                    block_tables=seq.tables_snapshot,
                    params=seq.request.params,
                    sample_seed=seq.seed,
                    position=end,
                    source_row=seq.pending_row if num_pending else None,
                    extras=None if seq.is_plain else chunk_extras(seq, start, end),
                )
            )
            step.budget -= 1
            seq.num_computed_tokens, seq.num_pending, seq.pending_row = end, num_pending + 1, step.num_samples
            step.num_samples += 1
            if not seq.is_plain:
                step.edits_logits |= seq.request.params.edits_logits

    def _extend(self, step: BatchDraft, seq: Sequence) -> None:
        """Hands tokens to a running sequence that needs blocks for them; where none are left, the last in line goes."""
        while True:
            num_tokens = seq.num_tokens + seq.num_pending - seq.num_computed_tokens
            if num_tokens > 1:
                num_behind = len(self.running) - self.running.index(seq) - 1
                num_promised = step.promised[1] if step.promised is not None and step.promised[0] < seq.key else 0
                num_tokens = self._chunk_of(num_tokens, step.budget - num_behind - num_promised)
            is_quiet = num_tokens == 1 and seq.num_computed_tokens < seq.quiet_until
            if is_quiet or self.blocks.reserve(seq, num_tokens):
                return self._schedule_chunk(step, seq, num_tokens)
            step.lacks_memory = True
            if self._preempt_last() is seq:
                return None

    def _chunk_of(self, num_tokens: int, budget: int) -> int:
        return max(1, min(num_tokens, self._max_chunk, budget))

    def _admit_waiting(self, step: BatchDraft) -> None:
        claimed = self.blocks.num_claimed(step.unfinished)
        while self.waiting and step.budget > 0:
            seq = self.waiting[0]
            if self._num_seats + seq.num_seats > self.max_num_seqs or seq in step.displaced:
                return
            prefix = self.blocks.cached_prefix(seq)
            if not self.blocks.can_admit(seq, prefix, claimed):
                return
            self.waiting.pop(0)
            self.blocks.attach(seq, prefix)
            if seq.num_cached_tokens is None:
                seq.num_cached_tokens = seq.num_computed_tokens
                self._started.append(seq.request.request_id)
                self._num_queries += seq.num_prompt_tokens
                self._num_hits += seq.num_computed_tokens
            num_tokens = self._chunk_of(seq.num_tokens - seq.num_computed_tokens, step.budget)
            fits = self.blocks.reserve(seq, num_tokens)
            assert fits
            self._enter_running(seq)
            self._schedule_chunk(step, seq, num_tokens)
            if step.unfinished and step.unfinished[-1] is seq:
                claimed = self.blocks.num_claimed(step.unfinished)

    def _schedule_chunk(self, step: BatchDraft, seq: Sequence, num_tokens: int) -> None:
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
        num_known, params = len(seq.token_ids), seq.request.params
        is_last = end == num_known + seq.num_pending
        step.chunks.append(
            ScheduledChunk(
                seq_id=seq.seq_id,
                token_ids=tuple(seq.token_ids[start:end]),
                start=start,
                block_tables=seq.tables_snapshot,
                params=params,
                sample_seed=seq.seed if is_last else None,
                position=end,
                source_row=seq.pending_row if end > num_known else None,
                extras=None if seq.is_plain else chunk_extras(seq, start, end),
            )
        )
        step.budget -= num_tokens
        seq.num_computed_tokens = end
        if is_last:
            seq.num_pending += 1
            seq.pending_row = step.num_samples
            step.num_samples += 1
            if not seq.is_plain:
                step.edits_logits |= params.edits_logits
        else:
            step.unfinished.append(seq)

    def _preempt_last(self) -> Sequence:
        seq = self.running[-1]
        self._leave_running(seq)
        self._send_back(seq)
        self._num_preemptions += 1
        return seq

    def _send_back(self, seq: Sequence) -> None:
        """Makes a sequence that has left the running wait, without its blocks."""
        self.blocks.free(seq)
        seq.status = SequenceStatus.WAITING
        bisect.insort(self.waiting, seq, key=_key)

    def _stop(self, seq: Sequence, token: SampledToken, token_id: int) -> SequenceDelta:
        """Ends a sequence with its latest token."""
        reason, stop_reason = FinishReason.STOP, None
        if token_id in seq.stop_ids:
            if seq.request.params.ignore_eos or token_id not in seq.request.eos_token_ids:
                stop_reason = token_id
        elif not token.ends_sequence:
            reason = FinishReason.LENGTH
        return self._finish(seq, reason, stop_reason, (token_id,), token.logprobs)

    def _fail(self, seq: Sequence, error: str | None) -> SequenceDelta:
        """Ends a sequence for which there is no token; without an error its logits were NaN."""
        delta = self._finish(seq, FinishReason.ERROR, error=error or NAN_ERROR)
        if error is None:
            self._num_nan += 1
            self.blocks.unpublish(seq)
        return delta

    def _fork(self, parent: Sequence) -> None:
        """Starts the other sequences of a request whose prompt has just been computed.

        Each recomputes the last prompt token to draw its own first token; all earlier ones are shared, or, if the
        parent has been preempted since, to be computed again.
        """
        is_running = parent.status is SequenceStatus.RUNNING
        self._num_prompt += parent.num_prompt_tokens
        self._num_cached += parent.num_cached_tokens or 0
        self._num_seats -= (parent.num_seats - 1) * is_running
        parent.num_seats, parent.has_forked = 1, True
        for index in range(1, parent.request.params.num_sequences):
            seq_id = parent.seq_id + index
            child = Sequence(
                seq_id=seq_id,
                request=parent.request,
                index=index,
                seed=(parent.seed + index * _SEED_STEP) % 2**64,
                key=(parent.key[0], seq_id),
                max_num_tokens=parent.max_num_tokens,
                token_ids=list(parent.request.prompt_token_ids),
                has_forked=True,
                num_cached_tokens=parent.num_cached_tokens,
            )
            self._requests[parent.request.request_id].append(child)
            self._live[seq_id] = child
            if is_running:
                self.blocks.fork(parent, child, num_tokens=parent.num_prompt_tokens - 1)
                self._enter_running(child)
            else:
                bisect.insort(self.waiting, child, key=_key)

    def _start_over(self, seq: Sequence) -> None:
        """Computes a sequence anew and all by itself: it gave NaN, and may have read that in another one's blocks."""
        if seq.status is SequenceStatus.RUNNING:
            self._leave_running(seq)
            self._send_back(seq)
        self.blocks.unpublish(seq)
        seq.num_stale, seq.num_pending = seq.num_pending, 0
        seq.has_shared_context = seq.may_hit_cache = False

    def _enter_running(self, seq: Sequence) -> None:
        seq.status = SequenceStatus.RUNNING
        self._num_seats += seq.num_seats
        bisect.insort(self.running, seq, key=_key)

    def _leave_running(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._num_seats -= seq.num_seats

    def _finish(
        self,
        seq: Sequence,
        reason: FinishReason,
        stop_reason: int | None = None,
        token_ids: tuple[int, ...] = (),
        logprobs: TokenLogprobs | None = None,
        error: str | None = None,
    ) -> SequenceDelta:
        if seq.status is SequenceStatus.RUNNING:
            self._leave_running(seq)
        else:
            self.waiting.remove(seq)
        self.blocks.end(seq)
        seq.status, seq.finish_reason, seq.stop_reason = SequenceStatus.FINISHED, reason, stop_reason
        del self._live[seq.seq_id]
        siblings = self._requests[seq.request.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._requests[seq.request.request_id]
        return sequence_delta(seq, token_ids, logprobs, error)


def _key(seq: Sequence) -> tuple[float, int]:
    return seq.key
