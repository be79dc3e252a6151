"""What goes into the engine and what comes out of it: plain data, no torch."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from fairlead.errors import ContextLengthError, RequestError
from fairlead.records import Record
from fairlead.sampling_params import MAX_LOGPROBS as MAX_LOGPROBS
from fairlead.sampling_params import MAX_N as MAX_N
from fairlead.sampling_params import SamplingParams as SamplingParams
from fairlead.sampling_params import StructuredOutputParams as StructuredOutputParams
from fairlead.sampling_params import stop_tokens


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the end of the context
    ABORT = "abort"  # the caller left
    ERROR = "error"  # the model gave NaN, or the engine failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt with its parameters, as the engine takes it.

    `cache_salt` separates prefix-cache tenants: blocks are shared only among equal salts. Under the scheduling policy
    "priority", requests of a lower `priority` are served first. `bad_words_token_ids` are
    the spellings of params.bad_words: the last token of one is never sampled where the output ends with the others.
    With `num_beam_candidates` it is one beam's step of the engine's own: the edited log-probabilities of so many best
    tokens come back, in place of the unedited ones.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    num_beam_candidates: int = 0

    def check(self, *, max_model_len: int, vocab_size: int, max_num_seqs: int) -> None:
        """Raises RequestError if a model of these limits can never run this request."""
        prompt = self.prompt_token_ids
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if len(prompt) >= max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {max_model_len} tokens. However, your prompt has "
                f"{len(prompt)} tokens, which leaves no room for an answer. Please shorten the prompt.",
                param="prompt",
            )
        if min(prompt) < 0 or max(prompt) >= vocab_size:
            bad = next(i for i in prompt if not 0 <= i < vocab_size)
            raise RequestError(f"token id {bad} is outside the vocabulary (0 to {vocab_size - 1})", param="prompt")
        for name, ids in (
            ("allowed_token_ids", self.params.allowed_token_ids or ()),
            ("logit_bias", tuple(self.params.logit_bias or ())),
        ):
            if ids and max(ids) >= vocab_size:
                raise RequestError(
                    f"{name}: token id {max(ids)} is outside the vocabulary (0 to {vocab_size - 1})", param=name
                )
        num_sequences = self.params.num_sequences
        if num_sequences > max_num_seqs:
            name = "n" if self.params.best_of is None else "best_of"
            raise RequestError(f"{name}={num_sequences} exceeds max_num_seqs={max_num_seqs}", param=name)


class SequenceStatus(Enum):
    """Where a sequence stands in the scheduler."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class BlockTable:
    """The KV blocks of a sequence in one cache group: `blocks[i]` is the block number `first + i` of its tokens.

    `first` is above 0 once blocks have left a sliding window.
    """

    first: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """The number of the block that would come next."""
        return self.first + len(self.blocks)


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One growing list of tokens: the only thing that the scheduler mutates besides its queues.

    A request has `params.num_sequences` of them. `num_computed_tokens` counts the tokens whose keys and values are in
    the cache once the steps scheduled so far have run; a step hands the sequence tokens until it has caught up with
    `num_tokens` and the `num_pending` ones that those steps sample, which are not known yet. `key` is its place in the
    order of service, and it ends with its `max_num_tokens`-th token at the latest.
    """

    seq_id: int
    request: Request
    index: int
    seed: int
    key: tuple[float, int]
    max_num_tokens: int
    token_ids: list[int]
    num_computed_tokens: int = 0
    num_pending: int = 0
    pending_row: int | None = None  # the place of the latest pending token among the sampled ones of its step
    num_stale: int = 0  # tokens of steps that still run, to be thrown away when they come
    num_seats: int = 1  # places among the running: its own, and those of the siblings that it will fork
    has_forked: bool = False  # whether those run, or are none
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    has_shared_context: bool = False  # whether another sequence computed some of what it reads
    may_hit_cache: bool = True
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    block_tables: list[BlockTable] = field(default_factory=list)  # one per cache group; none while it waits
    block_hashes: list[bytes] = field(default_factory=list)
    # Owned by the block manager: how many full blocks it has published, a copy of the tables for those who read them,
    # and the position up to which single tokens can be written without asking it.
    num_published: int = 0
    tables_snapshot: tuple[tuple[int, tuple[int, ...]], ...] = ()
    quiet_until: int = 0
    stop_ids: frozenset[int] = field(init=False)  # tokens that end it
    is_plain: bool = field(init=False)  # needs no ChunkExtras; asked in every step
    # Of the prompt's second token on, as far as computed; None where they are not wanted, or have been sent.
    prompt_logprobs: list["TokenLogprobs"] | None = field(init=False)

    def __post_init__(self) -> None:
        params = self.request.params
        self.stop_ids = frozenset(stop_tokens(params, self.request.eos_token_ids))
        self.prompt_logprobs = [] if params.prompt_logprobs is not None and self.index == 0 else None
        self.is_plain = not (
            params.edits_logits
            or params.is_ranked
            or self.request.num_beam_candidates
            or self.prompt_logprobs is not None
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of one position: the sampled token first, then the best ones in falling order.

    `rank` is the sampled token's place among all tokens, 1 for the most likely.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    rank: int


class SequenceDelta(Record, frozen=True, kw_only=True):
    """What one step added to one sequence; engine to front end. (A Record, as ScheduledChunk is.)

    `prompt_logprobs` comes with the first token of the first sequence, for the prompt's tokens but its first.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """One token's log-probability, its rank (1 is the most likely) and its text."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One generated continuation. `logprobs` has one dict (token id to Logprob) per generated token."""

    index: int
    text: str
    token_ids: Seq[int]
    cumulative_logprob: float | None = None
    logprobs: Seq[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A request's outputs so far: cumulative, one entry per continuation, in order of index.

    `prompt_logprobs` has one dict per prompt token, and None for the first, which nothing precedes.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Seq[int]
    outputs: Seq[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    error: str | None = None
    prompt_logprobs: Seq[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What a loaded engine is; the front end's view of it."""

    model: str
    platform: str
    device: str
    attention_backend: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    block_size: int
    num_blocks: int
    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int = 0  # the most that a step takes beside these
    activations_measured: bool = False  # in a step of the loaded model, rather than estimated from its shapes
    swap_bytes: int = 0  # host memory for KV blocks
    swap_costs: str = ""  # what moving a block costs against computing it, where there is swap space


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters (since start) and gauges of the engine, as of one moment."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of blocks that a sequence holds, 0 to 1
    num_preemptions: int = 0
    num_blocks_swapped_out: int = 0  # KV blocks copied to the host
    num_blocks_swapped_in: int = 0  # and back
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_prefix_queries: int = 0  # tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # tokens found there
    num_nan_sequences: int = 0
    num_steps: int = 0
    num_scheduled_tokens: int = 0  # that all steps computed
