"""What the scheduler hands to the model runner, and gets back: plain integers, snapshots of one step."""

from dataclasses import dataclass

from fairlead.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledChunk:
    """The next tokens of one sequence.

    `start` tokens are in the cache already. `block_tables` has, per cache group, the number of the first block held and
    the blocks from there on. `sample_seed` is None where the chunk ends before the last known token,
    so that nothing is sampled; else it makes the draw reproducible. `position` is the index of the token to sample.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_tables: tuple[tuple[int, tuple[int, ...]], ...]
    params: SamplingParams
    sample_seed: int | None
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    """One step. `block_copies` (group, source, destination) happen before any of its writes, in order."""

    chunks: tuple[ScheduledChunk, ...]
    block_copies: tuple[tuple[int, int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """The sampler's answer for one chunk. `token_id` is None where the logits held NaN, or where `error` says why.

    `ends_sequence` is set where the token completes a grammar that nothing can follow.
    """

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None
    ends_sequence: bool = False
