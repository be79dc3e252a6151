"""The engine's side of structured output: which requests may start, what each step's rows may be, who has finished.

Shapes: R rows of a step that have a grammar, W words of 32 bits that hold the vocabulary and one bit more.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fairlead.errors import RequestError
from fairlead.records import replaced
from fairlead.request import Request, Sequence, SequenceDelta
from fairlead.sampling.structured.backend import Grammar, Matcher
from fairlead.sampling.structured.compiler import CompileQueue, Compiler
from fairlead.scheduling.batch import SampledToken, ScheduledBatch

_WAIT_S = 0.01  # for a compilation when nothing else is to do: a request without a grammar waits no longer
NO_TOKEN = "no token of the vocabulary continues the grammar"
REFUSED = "the grammar refused a token that its own mask allowed"


class Sequences(Protocol):
    """What the scheduler knows."""

    def find_sequence(self, seq_id: int) -> Sequence | None: ...

    def has_request(self, request_id: str) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBitmask:
    """What the rows of a step that have a grammar may be: bit i of a row's words is token i."""

    rows_R: np.ndarray  # among the rows that sample
    words_RW: np.ndarray  # int32


@dataclass(slots=True, kw_only=True, eq=False)
class _Place:
    """One sequence in its grammar."""

    seq_id: int
    request: Request
    matcher: Matcher
    error: str | None = None


class PendingBitmask:
    """A mask that a thread fills while the model runs."""

    def __init__(self, places: list[tuple[int, _Place]], future: "Future[np.ndarray]") -> None:
        self.places = places
        self._future = future

    def wait(self) -> TokenBitmask:
        """The mask, once it is there."""
        rows_R = np.array([row for row, _ in self.places])
        return TokenBitmask(rows_R=rows_R, words_RW=self._future.result())


class StructuredOutputs:
    """Owned by the engine and driven by its thread; costs nothing while no request has a grammar.

    `submit` holds a request back until its grammar is compiled, `admit` gives out those that may start, and
    `take_rejected` those that never can. Then, for each step: `begin`, `advance`, `forget`.
    """

    def __init__(self, compiler: Compiler, sequences: Sequences, *, max_admitted: int) -> None:
        """`max_admitted` requests hold a grammar at a time; the others wait here, as text."""
        self.compiler = compiler
        self._queue = CompileQueue(compiler)
        self._sequences, self._max_admitted = sequences, max_admitted
        self._held: dict[str, tuple[Request, int]] = {}
        self._grammars: dict[str, Grammar] = {}  # of requests that have been admitted
        self._places: dict[int, _Place] = {}
        self._rejected: list[tuple[str, RequestError]] = []
        self._filler: ThreadPoolExecutor | None = None

    @property
    def num_held(self) -> int:
        """Requests whose grammar is not ready."""
        return len(self._held)

    def holds(self, request_id: str) -> bool:
        return request_id in self._held

    def submit(self, request: Request, seed: int) -> None:
        """Holds the request until its grammar is there."""
        assert request.params.structured_outputs is not None
        self._held[request.request_id] = (request, seed)
        self._queue.put(request.request_id, request.params.structured_outputs)

    def admit(self) -> list[tuple[Request, int]]:
        """Requests that may start, with their seeds; each must be given to the scheduler now."""
        admitted = []
        while self._held and len(self._grammars) < self._max_admitted and (entry := self._queue.take()) is not None:
            request_id, result = entry
            request, seed = self._held.pop(request_id)
            if isinstance(result, RequestError):
                self._rejected.append((request_id, result))
            else:
                self._grammars[request_id] = result
                admitted.append((request, seed))
        return admitted

    def wait(self) -> None:
        """Waits a moment for the next one to be ready."""
        self._queue.wait(_WAIT_S)

    def take_rejected(self) -> list[tuple[str, RequestError]]:
        """Requests that never can start, and why; each is told once."""
        rejected, self._rejected = self._rejected, []
        return rejected

    def begin(self, batch: ScheduledBatch) -> PendingBitmask | None:
        """Starts to fill the mask of a step, the one before it being over; None if none of its rows has a grammar."""
        if not self._grammars:
            return None
        samplers = [chunk for chunk in batch.chunks if chunk.sample_seed is not None]
        places = [
            (row, place)
            for row, chunk in enumerate(samplers)
            if chunk.params.structured_outputs is not None and (place := self._place(chunk.seq_id)) is not None
        ]
        if not places:
            return None
        if self._filler is None:
            self._filler = ThreadPoolExecutor(1, thread_name_prefix="fairlead-bitmask")
        return PendingBitmask(places, self._filler.submit(self._fill, [place for _, place in places]))

    def advance(self, pending: PendingBitmask, sampled: Seq[SampledToken]) -> list[SampledToken]:
        """Takes a step's tokens into the grammars; the result says which of them end their sequence."""
        tokens = list(sampled)
        for row, place in pending.places:
            tokens[row] = _advanced(place, tokens[row])
        return tokens

    def forget(self, deltas: Iterable[SequenceDelta]) -> None:
        """Lets go of the sequences that have ended with a step."""
        if self._grammars and any(delta.finish_reason is not None for delta in deltas):
            self.forget_ended()

    def forget_ended(self) -> None:
        """Lets go of whatever the scheduler no longer knows."""
        if self._grammars:
            known = self._sequences
            self._places = {i: place for i, place in self._places.items() if known.find_sequence(i) is not None}
            self._grammars = {i: grammar for i, grammar in self._grammars.items() if known.has_request(i)}

    def abort(self, request_id: str) -> None:
        """Lets go of a request whose sequences the scheduler has ended, or that it never got."""
        if self._held.pop(request_id, None) is not None:
            self._queue.cancel(request_id)
        self.forget_ended()

    def abort_all(self) -> None:
        """Lets go of all requests."""
        for request_id in list(self._held):
            self.abort(request_id)
        self._grammars.clear()
        self._places.clear()

    def close(self) -> None:
        """Ends threads and worker."""
        self.abort_all()
        self._queue.close()
        if self._filler is not None:
            self._filler.shutdown()

    def _place(self, seq_id: int) -> _Place | None:
        """None if the sequence has ended since the step was scheduled, or starts over."""
        sequence = self._sequences.find_sequence(seq_id)
        if sequence is None or sequence.num_stale:
            return None
        place = self._places.get(seq_id)
        if place is None:
            request = sequence.request
            place = _Place(seq_id=seq_id, request=request, matcher=self._grammars[request.request_id].start())
            self._places[seq_id] = place
        return place

    def _fill(self, places: list[_Place]) -> np.ndarray:
        vocabulary = self.compiler.vocabulary
        end_word, end_bit = vocabulary.end_id // 32, 1 << vocabulary.end_id % 32
        words_RW = np.zeros((len(places), vocabulary.num_words), np.int32)
        for row_W, place in zip(words_RW, places, strict=True):
            try:
                place.matcher.fill_bitmask(row_W)
            except BaseException as error:  # a library's panic is no Exception; it ends one sequence, not the engine
                place.error = f"the grammar cannot go on: {error!s:.300}"
            bits_W = row_W.view(np.uint32)
            may_end = bool(bits_W[end_word] & end_bit)
            bits_W[end_word] &= end_bit ^ 0xFFFFFFFF
            if may_end and not place.request.params.ignore_eos:
                for token_id in place.request.eos_token_ids:
                    bits_W[token_id // 32] |= 1 << token_id % 32
            if place.error is None and not bits_W.any():
                place.error = NO_TOKEN
            if place.error is not None:
                bits_W.fill(0xFFFFFFFF)  # the row is sampled in vain, and ends with its error
        return words_RW


def _advanced(place: _Place, token: SampledToken) -> SampledToken:
    if place.error is not None:
        return SampledToken(token_id=None, error=place.error)
    if token.token_id is None or token.token_id in place.request.eos_token_ids:
        return token
    try:
        if not place.matcher.accept(token.token_id):
            return SampledToken(token_id=None, error=REFUSED)
        return replaced(token, ends_sequence=True) if place.matcher.is_finished else token
    except Exception as error:  # whatever a library raises ends one sequence, not the engine
        return SampledToken(token_id=None, error=f"the grammar cannot go on: {error!s:.300}")
