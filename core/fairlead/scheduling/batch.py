"""What the scheduler hands to the model runner, and gets back: plain integers, snapshots of one step."""

from dataclasses import dataclass, field
from enum import Enum

from fairlead.records import Record
from fairlead.request import Request, SamplingParams, Sequence, SequenceDelta, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleContext:
    """All that came before a token whose logits are edited: the request, and every token of prompt and output."""

    request: Request
    token_ids: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def output(self) -> tuple[int, ...]:
        return self.token_ids[len(self.request.prompt_token_ids) :]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkExtras:
    """What most sequences never need, apart from the rest, so that a step of 64 plain ones pays nothing for it.

    `num_logprobs` takes the place of params.logprobs; for a beam (`is_beam`) the edited log-probabilities are meant.
    `prompt_targets` are prompt tokens whose log-probabilities are wanted; the chunk's tokens from number `prompt_row`
    on predict them, one each.
    """

    num_logprobs: int | None = None
    is_beam: bool = False
    prompt_targets: tuple[int, ...] = ()
    prompt_row: int = 0


class ScheduledChunk(Record, frozen=True, kw_only=True):
    """The next tokens of one sequence. (A Record: it is made once per sequence and step.)

    `start` tokens are in the cache before it. A chunk has the `token_ids`, or, where it was scheduled before the step
    that samples its only token is over, none and the `source_row`: the place of that token among the sampled ones of
    the step before. `block_tables` has, per cache group, the number of the first block held and the blocks from there
    on. `sample_seed` is None where the chunk ends before the sequence's last token, so that nothing is sampled; else
    it makes the draw reproducible. `position` is the index of the token to sample. `extras` is None for all but the
    few sequences that need it.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_tables: tuple[tuple[int, tuple[int, ...]], ...]
    params: SamplingParams
    sample_seed: int | None
    position: int
    source_row: int | None = None
    extras: ChunkExtras | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) if self.source_row is None else 1


class CopyKind(Enum):
    """Where a block is copied from and to."""

    WITHIN = "within"  # the device
    OUT = "out"  # from the device to the host
    IN = "in"  # from the host to the device


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """The copy of one block of a cache group; host blocks are numbered on their own."""

    kind: CopyKind
    group: int
    source: int
    destination: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """One step. `block_copies` happen before any of its writes, one after the other: a later one may read or overwrite
    what an earlier one wrote, on the host too."""

    chunks: tuple[ScheduledChunk, ...]
    block_copies: tuple[BlockCopy, ...]
    edits_logits: bool = False  # whether the params of a chunk that samples do

    @property
    def num_tokens(self) -> int:
        return sum(c.num_tokens for c in self.chunks)


@dataclass(slots=True, kw_only=True)
class BatchDraft:
    """A batch in the making."""

    budget: int
    chunks: list[ScheduledChunk] = field(default_factory=list)
    num_samples: int = 0
    edits_logits: bool = False
    unfinished: list[Sequence] = field(default_factory=list)  # those whose known tokens it does not compute to the end
    displaced: list[Sequence] = field(default_factory=list)  # those that make way for others
    promised: tuple[tuple[float, int], int] | None = None  # key and tokens of one that goes before running ones
    lacks_memory: bool = False


class SampledToken(Record, frozen=True, kw_only=True):
    """The sampler's answer for one chunk. `token_id` is None where there is none: `error` says why, and None there
    that the logits held NaN. `ends_sequence` is set where the token completes a grammar that nothing can follow."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    ends_sequence: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step gave: one token per chunk that samples, in order; prompt log-probabilities by seq_id."""

    sampled: list[SampledToken]
    prompt_logprobs: dict[int, list[TokenLogprobs]]


def chunk_extras(seq: Sequence, start: int, end: int) -> ChunkExtras:
    """Of the chunk with the tokens from `start` to `end` of a sequence that is not plain."""
    request = seq.request
    prompt_row, prompt_targets = 0, request.prompt_token_ids[:0]
    if seq.prompt_logprobs is not None:
        first = max(start, len(seq.prompt_logprobs))  # after a preemption, some are there already
        prompt_row, prompt_targets = first - start, request.prompt_token_ids[first + 1 : end + 1]
    return ChunkExtras(
        num_logprobs=request.num_beam_candidates or request.params.num_engine_logprobs,
        is_beam=request.num_beam_candidates > 0,
        prompt_targets=prompt_targets,
        prompt_row=prompt_row,
    )


def sequence_delta(
    seq: Sequence, token_ids: tuple[int, ...], logprobs: TokenLogprobs | None, error: str | None = None
) -> SequenceDelta:
    """What a step added to a sequence, with the prompt's log-probabilities if they have not been told yet."""
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    if seq.prompt_logprobs is not None:
        prompt_logprobs, seq.prompt_logprobs = tuple(seq.prompt_logprobs), None
    return SequenceDelta(
        request_id=seq.request.request_id,
        index=seq.index,
        token_ids=token_ids,
        logprobs=() if logprobs is None else (logprobs,),
        prompt_logprobs=prompt_logprobs,
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
        num_cached_tokens=seq.num_cached_tokens or 0,
        error=error,
    )
