"""How one request is sampled, with every bound checked: plain data, no torch."""

import math
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from fairlead.errors import RequestError
from fairlead.sampling.structured.params import StructuredOutputParams as StructuredOutputParams

StructuredOutputsParams = StructuredOutputParams  # vLLM's spelling of it

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 4096  # of one string: so much of a text may be held back until it is sure not to be one
MAX_STOP_TOKENS = 1024
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_CHARS = 256  # they are tokenised on the server's event loop
MAX_BEAM_STOP_TOKENS = 16  # a step looks at 1 + as many candidates per beam
_MAX_TOKEN_ID = 2**31 - 1


def _check(condition: bool, name: str, value: object, want: str) -> None:
    if not condition:
        raise RequestError(f"{name} must be {want}, got {value!r:.100}", param=name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    largest = sys.float_info.max  # an integer may be beyond it
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_TOKEN_ID


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Names and defaults are vLLM's.

    temperature 0 is greedy. top_k 0 and -1 both mean off. `seed` makes the request reproducible whatever shares its
    batch. `logprobs=k` returns the k best of every position beside the sampled token, `prompt_logprobs=k` the same of
    the prompt's tokens (which then are computed, whatever the prefix cache holds). `max_tokens=None` generates up to
    the end of the context. Raises RequestError (a ValueError) on a value out of range.

    `best_of` sequences are made, and the n of the highest cumulative log-probability come back, best first.
    `use_beam_search` (at temperature 0) keeps best_of, or else n, beams, as transformers does: a finished one scores
    its log-probability divided by length ** length_penalty, and the search ends with as many finished ones
    (early_stopping=True), when a guess says that no better one will come (False), or when none can ("never").
    `truncate_prompt_tokens=k` keeps the prompt's last k tokens, -1 as many as leave room for max_tokens (or one).
    `spaces_between_special_tokens` is taken and changes nothing: only slow tokenizers, which we never use, know it.

    What changes the logits, in this order: `logits_processors` (callables of this process, or names of entry points),
    `allowed_token_ids` (no others), `logit_bias` (added), `bad_words` and `min_tokens` (no end before so many tokens);
    then `repetition_penalty` (tokens of prompt and output), `frequency_penalty` and `presence_penalty` (of the output);
    then temperature and the rest. Log-probabilities that are returned stay those of the unchanged logits.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    logits_processors: tuple[object, ...] = ()
    structured_outputs: StructuredOutputParams | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        self._tidy()
        _check(_is_int(self.n) and 1 <= self.n <= MAX_N, "n", self.n, f"an integer from 1 to {MAX_N}")
        if self.best_of is not None:
            ok = _is_int(self.best_of) and self.n <= self.best_of <= MAX_N
            _check(ok, "best_of", self.best_of, f"an integer from n={self.n} to {MAX_N}")
        for name, low, high, want in (
            ("presence_penalty", -2.0, 2.0, "a number in [-2, 2]"),
            ("frequency_penalty", -2.0, 2.0, "a number in [-2, 2]"),
            ("repetition_penalty", 0.0, math.inf, "a finite number > 0"),
            ("temperature", 0.0, math.inf, "a finite number >= 0"),
            ("length_penalty", -10.0, 10.0, "a number in [-10, 10]"),
            ("top_p", 0.0, 1.0, "a number in (0, 1]"),
            ("min_p", 0.0, 1.0, "a number in [0, 1]"),
        ):
            value = getattr(self, name)
            _check(_is_number(value) and low <= value <= high, name, value, want)
        _check(self.top_p > 0, "top_p", self.top_p, "a number in (0, 1]")
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a finite number > 0")
        _check(_is_int(self.top_k) and -1 <= self.top_k < 2**31, "top_k", self.top_k, "an integer from -1 to 2^31 - 1")
        if self.seed is not None:
            _check(_is_int(self.seed) and -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        self._check_texts("stop", MAX_STOP_STRINGS, MAX_STOP_CHARS)
        self._check_texts("bad_words", MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)
        self._check_token_ids()
        if self.max_tokens is not None:
            _check(_is_int(self.max_tokens) and self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        most = 2**31 - 1 if self.max_tokens is None else self.max_tokens
        ok = _is_int(self.min_tokens) and 0 <= self.min_tokens <= most
        _check(ok, "min_tokens", self.min_tokens, "an integer from 0 to max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            ok = value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS)
            _check(ok, name, value, f"an integer from 0 to {MAX_LOGPROBS}")
        if self.truncate_prompt_tokens is not None:
            size = self.truncate_prompt_tokens
            ok = _is_int(size) and (size == -1 or 1 <= size < 2**31)
            _check(ok, "truncate_prompt_tokens", size, "-1, or an integer from 1 to 2^31 - 1")
        for processor in self.logits_processors:
            ok = callable(processor) or (isinstance(processor, str) and processor != "")
            _check(ok, "logits_processors", processor, "names of entry points, or callables")
        spec = self.structured_outputs
        ok = spec is None or isinstance(spec, StructuredOutputParams)
        _check(ok, "structured_outputs", spec, "a StructuredOutputParams")
        self._check_beams()
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids without it", param="stop")

    def _tidy(self) -> None:
        """Lists become tuples, None the empty one, one string a tuple of it, and JSON's text keys of a bias numbers."""
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "logits_processors"):
            value = getattr(self, name)
            if value is None or isinstance(value, (list, tuple)):
                object.__setattr__(self, name, tuple(value or ()))
        if isinstance(self.allowed_token_ids, (list, tuple)):
            object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(self.allowed_token_ids)))
        bias: object = self.logit_bias
        if isinstance(bias, Mapping):
            _check(len(bias) <= MAX_LOGIT_BIAS, "logit_bias", len(bias), f"at most {MAX_LOGIT_BIAS} entries")
            object.__setattr__(self, "logit_bias", {_as_int(key): value for key, value in bias.items()} or None)

    def _check_texts(self, name: str, most: int, most_chars: int) -> None:
        texts = getattr(self, name)
        _check(isinstance(texts, tuple), name, texts, "a list of strings")
        _check(len(texts) <= most, name, len(texts), f"at most {most} strings")
        for text in texts:
            _check(isinstance(text, str) and text != "", name, text, "strings that are not empty")
            _check(len(text) <= most_chars, name, text, f"strings of at most {most_chars} characters")

    def _check_token_ids(self) -> None:
        want = "token ids from 0 to 2^31 - 1"
        ids = self.stop_token_ids
        _check(isinstance(ids, tuple), "stop_token_ids", ids, want)
        _check(len(ids) <= MAX_STOP_TOKENS, "stop_token_ids", len(ids), f"at most {MAX_STOP_TOKENS} token ids")
        _check(all(map(_is_token_id, ids)), "stop_token_ids", ids, want)
        allowed = self.allowed_token_ids
        if allowed is not None:
            ok = isinstance(allowed, tuple) and allowed != () and all(map(_is_token_id, allowed))
            _check(ok, "allowed_token_ids", allowed, f"at least one of the {want}")
        if self.logit_bias is not None:
            _check(isinstance(self.logit_bias, dict), "logit_bias", self.logit_bias, "token ids with numbers")
            for token_id, value in self.logit_bias.items():
                _check(_is_token_id(token_id), "logit_bias", token_id, f"of {want}")
                _check(_is_number(value) and -100 <= value <= 100, "logit_bias", value, "of numbers in [-100, 100]")
        _check(isinstance(self.logits_processors, tuple), "logits_processors", self.logits_processors, "a list")

    def _check_beams(self) -> None:
        _check(isinstance(self.use_beam_search, bool), "use_beam_search", self.use_beam_search, "true or false")
        ok = isinstance(self.early_stopping, bool) or self.early_stopping == "never"
        _check(ok, "early_stopping", self.early_stopping, "true, false or 'never'")
        if not self.use_beam_search:
            _check(self.early_stopping is False, "early_stopping", self.early_stopping, "False without use_beam_search")
            _check(self.length_penalty == 1, "length_penalty", self.length_penalty, "1 without use_beam_search")
            return
        _check(self.temperature == 0, "temperature", self.temperature, "0 with use_beam_search")
        spec = self.structured_outputs
        _check(spec is None, "structured_outputs", spec, "left out with use_beam_search")
        _check(self.stop == (), "stop", self.stop, "empty with use_beam_search; use stop_token_ids")
        want = f"at most {MAX_BEAM_STOP_TOKENS} with use_beam_search"
        _check(len(self.stop_token_ids) <= MAX_BEAM_STOP_TOKENS, "stop_token_ids", len(self.stop_token_ids), want)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine brings back; n of them are the answer. (Beams are chosen by the engine.)"""
        return self.n if self.use_beam_search else self.beam_width

    @property
    def beam_width(self) -> int:
        """How many beams a search keeps."""
        return self.best_of or self.n

    @property
    def is_ranked(self) -> bool:
        """Whether what comes back is known only when every sequence has ended."""
        return self.use_beam_search or self.num_sequences > self.n

    @property
    def num_engine_logprobs(self) -> int | None:
        """`logprobs`, but where sequences are ranked at least the sampled token's own."""
        return 0 if self.logprobs is None and self.is_ranked else self.logprobs

    def for_one_beam(self, *, with_prompt_logprobs: bool) -> "SamplingParams":
        """How a single beam takes its next step."""
        return replace(
            self,
            n=1,
            best_of=None,
            use_beam_search=False,
            length_penalty=1.0,
            early_stopping=False,
            logprobs=None,
            prompt_logprobs=self.prompt_logprobs if with_prompt_logprobs else None,
        )

    @property
    def is_penalised(self) -> bool:
        """Whether tokens that occurred count less, or more."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)

    @property
    def edits_logits(self) -> bool:
        """Whether anything is done to the logits before temperature and the cuts."""
        return (
            self.is_penalised
            or self.min_tokens > 0
            or self.logit_bias is not None
            or self.allowed_token_ids is not None
            or self.bad_words != ()
            or self.logits_processors != ()
        )

    @property
    def callables(self) -> tuple[Callable[..., object], ...]:
        """The logits processors that are no names: they work in the process that made them, and nowhere else."""
        return tuple(processor for processor in self.logits_processors if callable(processor))


def stop_tokens(params: SamplingParams, eos_token_ids: Seq[int]) -> tuple[int, ...]:
    """The tokens that end a sequence."""
    return params.stop_token_ids + (() if params.ignore_eos else tuple(eos_token_ids))


def _as_int(key: object) -> object:
    """JSON objects have text keys only."""
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10:
        return int(key)
    return key
