"""Engine deltas to request outputs: text, stop strings, log-probabilities. Runs where the caller runs; no torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from fairlead.errors import RequestError
from fairlead.request import (
    CompletionOutput,
    FinishReason,
    Logprob,
    Request,
    RequestOutput,
    SequenceDelta,
    TokenLogprobs,
)
from fairlead.tokenization.detokenizer import Detokenizer
from fairlead.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessedOutputs:
    """What a batch of deltas came to.

    `outputs` has one entry per request that changed. `finish` names the sequences, as (request_id, index), that a stop
    string ended here: the engine does not know of it and must be told.
    """

    outputs: list[RequestOutput]
    finish: list[tuple[str, int]]


@dataclass(slots=True, kw_only=True)
class _SequenceState:
    detokenizer: Detokenizer | None
    token_ids: list[int] = field(default_factory=list)
    token_logprobs: list[float] | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def end(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Gives out the held text; a stop string that this brings to light is what ended the sequence."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self.detokenizer is not None:
            self.detokenizer.finish()
            self.end_at_stop_string()

    def end_at_stop_string(self) -> None:
        """If the text has met a stop string, ends there and drops the tokens behind it."""
        if self.detokenizer is None or self.detokenizer.stop is None:
            return
        self.finish_reason, self.stop_reason = FinishReason.STOP, self.detokenizer.stop
        kept = self.detokenizer.num_tokens
        del self.token_ids[kept:]
        if self.token_logprobs is not None:
            del self.token_logprobs[kept:]
            self.cumulative_logprob = sum(self.token_logprobs, 0.0)
        if self.logprobs is not None:
            del self.logprobs[kept:]

    def output(self, index: int) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text="" if self.detokenizer is None else self.detokenizer.text,
            token_ids=self.token_ids.copy(),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs.copy(),
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=self.stop_reason,
        )


@dataclass(slots=True, kw_only=True)
class _RequestState:
    request: Request
    prompt: str | None
    sequences: list[_SequenceState]
    num_cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def end(self, reason: FinishReason) -> None:
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                sequence.end(reason)

    def output(self) -> RequestOutput:
        sequences = self.sequences
        if len(sequences) > self.request.params.n:
            sequences = sorted(sequences, key=lambda s: -(s.cumulative_logprob or 0.0))[: self.request.params.n]
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            outputs=[sequence.output(index) for index, sequence in enumerate(sequences)],
            finished=self.finished,
            num_cached_tokens=self.num_cached_tokens,
            error=self.error,
            prompt_logprobs=self.prompt_logprobs,
        )


class OutputProcessor:
    """The requests in flight, as their caller sees them. A request is forgotten once all its sequences have ended."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[str, _RequestState] = {}

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def add(self, request: Request, prompt: str | None) -> None:
        """Takes up a request before its first delta. Raises RequestError on stop strings without a tokenizer."""
        assert request.request_id not in self._requests, f"request id {request.request_id!r} is in flight"
        params = request.params
        if params.stop and self._tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids without one", param="stop")
        sequences = []
        for _ in range(params.num_sequences):
            detokenizer = None
            if self._tokenizer is not None and params.detokenize:
                detokenizer = Detokenizer(self._tokenizer, request.prompt_token_ids, params)
            sequence = _SequenceState(detokenizer=detokenizer)
            if params.logprobs is not None or params.is_ranked:
                sequence.token_logprobs, sequence.cumulative_logprob = [], 0.0
            if params.logprobs is not None:
                sequence.logprobs = []
            sequences.append(sequence)
        self._requests[request.request_id] = _RequestState(request=request, prompt=prompt, sequences=sequences)

    def process(self, deltas: Iterable[SequenceDelta], *, only_finished: bool = False) -> ProcessedOutputs:
        """Takes what a step added; returns the changed requests' outputs so far, or only those that have ended.

        Of a request whose sequences are ranked there is nothing to return before all have ended.
        Deltas of requests and sequences that have ended here are passed over: the engine may be steps ahead.
        """
        changed: dict[str, _RequestState] = {}
        finish: list[tuple[str, int]] = []
        for delta in deltas:
            state = self._requests.get(delta.request_id)
            if state is None or state.sequences[delta.index].finish_reason is not None:
                continue
            changed[delta.request_id] = state
            self._apply(delta, state)
            if delta.finish_reason is None and state.sequences[delta.index].finish_reason is not None:
                finish.append((delta.request_id, delta.index))
        outputs = []
        for request_id, state in changed.items():
            finished = state.finished
            if finished:
                del self._requests[request_id]
            if finished or not (only_finished or state.request.params.is_ranked):
                outputs.append(state.output())
        return ProcessedOutputs(outputs=outputs, finish=finish)

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request's open sequences and forgets it; None if it is not in flight."""
        state = self._requests.pop(request_id, None)
        if state is None:
            return None
        state.end(FinishReason.ABORT)
        return state.output()

    def fail_all(self, message: str) -> list[RequestOutput]:
        """Ends every request with an error, when the engine has died."""
        states, self._requests = self._requests, {}
        for state in states.values():
            state.error = message
            state.end(FinishReason.ERROR)
        return [state.output() for state in states.values()]

    def _apply(self, delta: SequenceDelta, state: _RequestState) -> None:
        sequence = state.sequences[delta.index]
        state.num_cached_tokens = max(state.num_cached_tokens, delta.num_cached_tokens)
        state.error = state.error or delta.error
        if state.request.params.prompt_logprobs is not None and state.prompt_logprobs is None and delta.error is None:
            state.prompt_logprobs = [None, *map(self._logprobs, delta.prompt_logprobs)]
        sequence.token_ids += delta.token_ids
        if sequence.token_logprobs is not None and sequence.cumulative_logprob is not None:
            sequence.token_logprobs += (found.logprobs[0] for found in delta.logprobs)
            sequence.cumulative_logprob += sum(found.logprobs[0] for found in delta.logprobs)
        if sequence.logprobs is not None:
            sequence.logprobs += map(self._logprobs, delta.logprobs)
        if sequence.detokenizer is not None:
            visible = delta.token_ids
            # The token that stopped it is, like a stop string, no text; the one that completes a grammar is.
            stopped = delta.finish_reason is FinishReason.STOP and not _completes_grammar(state.request, delta)
            if stopped and not state.request.params.include_stop_str_in_output:
                visible = visible[:-1]
            sequence.detokenizer.push(visible)
            sequence.end_at_stop_string()
        if delta.finish_reason is not None and sequence.finish_reason is None:
            sequence.end(delta.finish_reason, delta.stop_reason)

    def _logprobs(self, found: TokenLogprobs) -> dict[int, Logprob]:
        """The sampled token first, then the best ones but it."""
        ranks = (found.rank, *range(1, len(found.token_ids)))
        entries: dict[int, Logprob] = {}
        for token_id, logprob, rank in zip(found.token_ids, found.logprobs, ranks, strict=True):
            if token_id not in entries:
                text = None if self._tokenizer is None else self._tokenizer.token_text(token_id)
                entries[token_id] = Logprob(logprob=logprob, rank=rank, decoded_token=text)
        return entries


def _completes_grammar(request: Request, delta: SequenceDelta) -> bool:
    """Whether the last token stopped the sequence because its grammar allows no other, rather than by what it is."""
    is_stop_token = delta.stop_reason is not None or delta.token_ids[-1] in request.eos_token_ids
    return request.params.structured_outputs is not None and not is_stop_token
