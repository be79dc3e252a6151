"""Beam search, around the scheduler rather than in it.

Each beam of each step is a sequence of its own, which begins with the request's prompt and the beam's tokens, as a
preempted sequence does when it resumes, and ends after one token. The scheduler knows nothing of beams: chunks,
preemption and prefix hits work as ever. With the prefix cache a step computes at most one block per beam again;
without it, all of it, which is slow and just as right.

Source: transformers 5, `GenerationMixin._beam_search`, whose rules and float32 arithmetic these are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from fairlead.request import FinishReason, Request, SequenceDelta, TokenLogprobs
from fairlead.sampling_params import stop_tokens
from fairlead.scheduling.scheduler import Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """Tokens behind the prompt, and the sum of their log-probabilities."""

    tokens: tuple[int, ...] = ()
    score: np.float32 = field(default_factory=lambda: np.float32(0))
    logprobs: tuple[TokenLogprobs, ...] = ()

    def extended(self, best: TokenLogprobs, place: int, num_logprobs: int) -> "Beam":
        """The beam with the token that stands at a place among its best ones."""
        token_id, logprob = best.token_ids[place], best.logprobs[place]
        shown = TokenLogprobs(
            token_ids=(token_id, *best.token_ids[:num_logprobs]),
            logprobs=(logprob, *best.logprobs[:num_logprobs]),
            rank=place + 1,
        )
        score = self.score + np.float32(logprob)
        return Beam(tokens=(*self.tokens, token_id), score=score, logprobs=(*self.logprobs, shown))


class BeamSearch:
    """The beams of one request. `running` are those to continue; `best` are the finished ones, best first."""

    def __init__(self, request: Request, max_model_len: int) -> None:
        params = request.params
        room = max_model_len - len(request.prompt_token_ids)
        self.request = request
        self.width = params.beam_width
        self.running: list[Beam] = [Beam()]
        self.best: list[tuple[np.float32, Beam]] = []
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.num_cached_tokens = 0
        self.ends = frozenset(stop_tokens(params, request.eos_token_ids))
        self.num_candidates = max(2, 1 + len(self.ends)) * self.width
        self._max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)

    def advance(self, found: list[TokenLogprobs]) -> None:
        """Takes the best continuations of each running beam, best first; `running` is empty when the search is over."""
        params = self.request.params
        num_shown = params.logprobs or 0
        grown = [
            (beam, best, place, beam.score + np.float32(best.logprobs[place]))
            for beam, best in zip(self.running, found, strict=True)
            for place in range(len(best.token_ids))
            if best.logprobs[place] > -np.inf
        ]
        grown.sort(key=lambda candidate: -candidate[3])
        candidates = [b.extended(best, place, num_shown) for b, best, place, _ in grown[: self.num_candidates]]
        is_last = len(self.running[0].tokens) + 1 >= self._max_tokens
        ends = [is_last or beam.tokens[-1] in self.ends for beam in candidates]
        for beam, end in zip(candidates[: self.width], ends, strict=False):
            if end:
                self.best.append((self._normalised(beam.score, len(beam.tokens)), beam))
        self.best.sort(key=lambda entry: -entry[0])
        del self.best[self.width :]
        self.running = [beam for beam, end in zip(candidates, ends, strict=True) if not end][: self.width]
        if self._is_decided():
            self.running = []

    def _is_decided(self) -> bool:
        """Whether no running beam can better the finished ones, or early_stopping says that it need not try."""
        if not self.running or len(self.best) < self.width:
            return False
        params = self.request.params
        if params.early_stopping is True:
            return True
        length = len(self.running[0].tokens)
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = self._max_tokens
        return not self._normalised(self.running[0].score, length) > self.best[-1][0]

    def _normalised(self, score: np.float32, length: int) -> np.float32:
        return np.float32(score / np.float32(length**self.request.params.length_penalty))


@dataclass(slots=True, kw_only=True)
class _Open:
    """A search whose step is being computed: its sequences by request id, and what has come back of them."""

    search: BeamSearch
    seed: int
    places: dict[str, int] = field(default_factory=dict)
    found: dict[int, TokenLogprobs] = field(default_factory=dict)
    num_started: int = 0


class BeamSearches:
    """All beam searches of an engine: they feed its scheduler and take their sequences' deltas out of the stream."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._open: dict[str, _Open] = {}
        self._owners: dict[str, str] = {}  # a sequence's request id to the id of the request that it works for

    def __bool__(self) -> bool:
        return bool(self._open)

    def add(self, request: Request, seed: int) -> None:
        """Starts a search. Raises ValueError if the request's id is in use."""
        if request.request_id in self._open:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self._open[request.request_id] = _Open(search=BeamSearch(request, self._scheduler.max_model_len), seed=seed)
        self._start(self._open[request.request_id])

    def abort(self, request_id: str) -> None:
        """Ends a search and its sequences; does nothing if there is none of this id."""
        found = self._open.pop(request_id, None)
        for part in () if found is None else found.places:
            self._scheduler.abort(part)
            del self._owners[part]

    def clear(self) -> None:
        """Ends all searches."""
        for request_id in list(self._open):
            self.abort(request_id)

    def take(self, deltas: Iterable[SequenceDelta]) -> list[SequenceDelta]:
        """Replaces the deltas of beams by those of the searches that they end, and starts the others' next step."""
        passed: list[SequenceDelta] = []
        for delta in deltas:
            owner = self._owners.get(delta.request_id)
            if owner is None:
                passed.append(delta)
            elif owner in self._open:
                passed += self._take(owner, delta)
        return passed

    def _take(self, request_id: str, delta: SequenceDelta) -> list[SequenceDelta]:
        found = self._open[request_id]
        search = found.search
        if delta.error is not None:
            self.abort(request_id)
            return _failed(search.request, delta.error)
        self._scheduler.abort(delta.request_id)  # one token is all that we want of it
        best = delta.logprobs[0]
        found.found[found.places[delta.request_id]] = replace(
            best, token_ids=best.token_ids[1:], logprobs=best.logprobs[1:]
        )
        if not search.running[0].tokens:
            search.prompt_logprobs, search.num_cached_tokens = delta.prompt_logprobs, delta.num_cached_tokens
        if len(found.found) < len(search.running):
            return []
        for part in found.places:
            del self._owners[part]
        search.advance([found.found[i] for i in range(len(search.running))])
        found.places, found.found = {}, {}
        if search.running:
            self._start(found)
            return []
        del self._open[request_id]
        return _finished(search)

    def _start(self, found: _Open) -> None:
        search = found.search
        is_first = not search.running[0].tokens
        params = search.request.params.for_one_beam(with_prompt_logprobs=is_first)
        for place, beam in enumerate(search.running):
            part = f"{search.request.request_id}/{found.num_started}"
            found.num_started += 1
            found.places[part] = place
            self._owners[part] = search.request.request_id
            request = replace(search.request, request_id=part, params=params, num_beam_candidates=search.num_candidates)
            self._scheduler.add(request, found.seed, beam.tokens)


def _finished(search: BeamSearch) -> list[SequenceDelta]:
    request = search.request
    if len(search.best) < request.params.n:
        message = f"the beam search ended with {len(search.best)} sequences of the n={request.params.n} asked for"
        return _failed(request, message)
    deltas = []
    for index, (_, beam) in enumerate(search.best[: request.params.n]):
        last = beam.tokens[-1]
        is_eos = last in request.eos_token_ids and not request.params.ignore_eos
        deltas.append(
            SequenceDelta(
                request_id=request.request_id,
                index=index,
                token_ids=beam.tokens,
                logprobs=beam.logprobs,
                prompt_logprobs=search.prompt_logprobs if index == 0 else (),
                finish_reason=FinishReason.STOP if last in search.ends else FinishReason.LENGTH,
                stop_reason=last if last in search.ends and not is_eos else None,
                num_cached_tokens=search.num_cached_tokens,
            )
        )
    return deltas


def _failed(request: Request, error: str) -> list[SequenceDelta]:
    return [
        SequenceDelta(
            request_id=request.request_id, index=i, token_ids=(), finish_reason=FinishReason.ERROR, error=error
        )
        for i in range(request.params.n)
    ]
