"""What goes into the engine and what comes out of it: plain data, no torch."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum, StrEnum

from fairlead.errors import ContextLengthError, RequestError
from fairlead.sampling.structured.params import StructuredOutputParams as StructuredOutputParams

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens or the end of the context
    ABORT = "abort"  # the caller left
    ERROR = "error"  # the model gave NaN, or the engine failed


def _check(condition: bool, name: str, value: object, want: str) -> None:
    if not condition:
        raise RequestError(f"{name} must be {want}, got {value!r:.100}", param=name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Names and defaults are vLLM's.

    temperature 0 is greedy. top_k 0 and -1 both mean off. `seed` makes the request reproducible whatever shares its
    batch. `logprobs=k` returns the k best of every position beside the sampled token. `max_tokens=None` generates up
    to the end of the context. Raises RequestError (a ValueError) on a value out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputParams | None = None

    def __post_init__(self) -> None:
        stop: object = self.stop
        if isinstance(stop, str):
            object.__setattr__(self, "stop", (stop,))
        elif stop is None or isinstance(stop, (list, tuple)):
            object.__setattr__(self, "stop", tuple(stop or ()))
        ids: object = self.stop_token_ids
        if ids is None or isinstance(ids, (list, tuple)):
            object.__setattr__(self, "stop_token_ids", tuple(ids or ()))
        _check(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"an integer from 1 to {MAX_N}")
        for name, low, high, want in (
            ("temperature", 0.0, math.inf, "a finite number >= 0"),
            ("top_p", 0.0, 1.0, "a number in (0, 1]"),
            ("min_p", 0.0, 1.0, "a number in [0, 1]"),
        ):
            value = getattr(self, name)
            ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            _check(ok and low <= value <= high, name, value, want)
        _check(self.top_p > 0, "top_p", self.top_p, "a number in (0, 1]")
        _check(_is_int(self.top_k) and -1 <= self.top_k < 2**31, "top_k", self.top_k, "an integer from -1 to 2^31 - 1")
        if self.seed is not None:
            _check(_is_int(self.seed) and -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", len(self.stop), f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            _check(isinstance(text, str) and text != "", "stop", text, "strings that are not empty")
        ok = all(_is_int(i) and 0 <= i < 2**31 for i in self.stop_token_ids)
        _check(ok, "stop_token_ids", ids, "token ids from 0 to 2^31 - 1")
        if self.max_tokens is not None:
            _check(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        if self.logprobs is not None:
            ok = _is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS
            _check(ok, "logprobs", self.logprobs, f"an integer from 0 to {MAX_LOGPROBS}")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids without it", param="stop")
        spec = self.structured_outputs
        ok = spec is None or isinstance(spec, StructuredOutputParams)
        _check(ok, "structured_outputs", spec, "a StructuredOutputParams")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt with its parameters, as the engine takes it.

    `cache_salt` separates prefix-cache tenants: blocks are shared only among equal salts.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""

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
        if self.params.n > max_num_seqs:
            raise RequestError(f"n={self.params.n} exceeds max_num_seqs={max_num_seqs}", param="n")


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

    A request has `params.n` of them. `num_computed_tokens` counts the tokens whose keys and values are in the cache;
    a step hands the sequence tokens until it has caught up with `num_tokens`.
    """

    seq_id: int
    request: Request
    index: int
    seed: int
    token_ids: list[int]
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at first admission
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    block_tables: list[BlockTable] = field(default_factory=list)  # one per cache group; none while it waits
    block_hashes: list[bytes] = field(default_factory=list)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceDelta:
    """What one step added to one sequence; engine to front end."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
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
    """A request's outputs so far: cumulative, one entry per continuation, in order of index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Seq[int]
    outputs: Seq[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    error: str | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters (since start) and gauges of the engine, as of one moment."""

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of blocks that a sequence holds, 0 to 1
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_prefix_queries: int = 0  # tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # tokens found there
    num_nan_sequences: int = 0
    num_steps: int = 0
