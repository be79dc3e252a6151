"""Grammars by xgrammar, which computes most of a mask when it compiles. An extra: its wheel asks for more packages."""

import importlib
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np

from fairlead.sampling.structured.backend import XGRAMMAR, GrammarError, Vocabulary, choice_regex, is_ebnf, whole_regex

_BASE_BYTES = 32 * 1024  # what its own figure leaves out: 144 KiB were measured where it says 117
MAX_WHITESPACE = 2  # at each place where JSON may have some, as with llguidance


class _Matcher(Protocol):
    def fill_next_token_bitmask(self, bitmask: np.ndarray, index: int = 0) -> bool: ...

    def accept_token(self, token_id: int) -> bool: ...

    def is_completed(self) -> bool: ...

    def fork(self) -> "_Matcher": ...


class _Compiled(Protocol):
    @property
    def memory_size_bytes(self) -> int: ...


class Filters:
    """What xgrammar's own masks let through and must not: sets of tokens as words W.

    Its character classes hold code points that UTF-8 does not have, and its JSON strings control characters.
    Source: RFC 3629, section 4, whose table restricts the byte behind E0, ED, F0 and F4.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        tokens = vocabulary.tokens
        self.of_json = self._words([all(b >= 32 or b == 10 for b in token) for token in tokens], may_end=True)
        bad_followers = {0xE0: (0x80, 0x9F), 0xED: (0xA0, 0xBF), 0xF0: (0x80, 0x8F), 0xF4: (0x90, 0xBF)}
        self.behind = {
            lead: self._words([not (token and low <= token[0] <= high) for token in tokens], may_end=True)
            for lead, (low, high) in bad_followers.items()
        }

    def last_byte(self, token_id: int) -> int:
        """The last byte that a token adds, or 0."""
        token = self._vocabulary.tokens[token_id] if token_id < self._vocabulary.end_id else b""
        return token[-1] if token else 0

    def _words(self, is_kept: list[bool], *, may_end: bool) -> np.ndarray:
        bits = np.zeros(32 * self._vocabulary.num_words, np.uint8)
        bits[: len(is_kept)] = is_kept
        bits[self._vocabulary.end_id] = may_end
        return np.packbits(bits, bitorder="little").view(np.int32)


class XGrammarMatcher:
    """One sequence's place in a grammar of xgrammar."""

    def __init__(
        self, matcher: _Matcher, vocabulary: Vocabulary, filters: Filters, *, is_json: bool, last_byte: int = 0
    ) -> None:
        self._matcher, self._vocabulary, self._filters = matcher, vocabulary, filters
        self._is_json, self._last_byte = is_json, last_byte
        self._next_W: np.ndarray | None = None  # the next mask, where `accept` had to know it

    def fill_bitmask(self, row_W: np.ndarray) -> None:
        """See Matcher."""
        if self._next_W is None:
            row_W.fill(-1)
            self._matcher.fill_next_token_bitmask(row_W[None])
            if self._is_json:
                row_W &= self._filters.of_json
            if self._last_byte in self._filters.behind:
                row_W &= self._filters.behind[self._last_byte]
        else:
            row_W[:] = self._next_W

    def accept(self, token_id: int) -> bool:
        """See Matcher."""
        self._next_W = None
        self._last_byte = self._filters.last_byte(token_id)
        return self._matcher.accept_token(token_id)

    @property
    def is_finished(self) -> bool:
        if not self._matcher.is_completed():
            return False
        if self._next_W is None:
            next_W = np.empty(self._vocabulary.num_words, np.int32)
            self.fill_bitmask(next_W)
            self._next_W = next_W
        only_end_W = np.zeros(self._vocabulary.num_words, np.uint32)
        only_end_W[self._vocabulary.end_id // 32] = 1 << self._vocabulary.end_id % 32
        return bool((self._next_W.view(np.uint32) == only_end_W).all())

    def fork(self) -> "XGrammarMatcher":
        """See Matcher."""
        fork = self._matcher.fork()
        return XGrammarMatcher(fork, self._vocabulary, self._filters, is_json=self._is_json, last_byte=self._last_byte)


class XGrammarGrammar:
    """A compiled grammar."""

    def __init__(self, start: Callable[[], XGrammarMatcher], size_bytes: int) -> None:
        self._start = start
        self.size_bytes = size_bytes

    def start(self) -> XGrammarMatcher:
        """A matcher at the beginning."""
        return self._start()


class XGrammarBackend:
    """xgrammar with one vocabulary. Its own cache is off, since ours is bounded by bytes."""

    name = XGRAMMAR

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._library = importlib.import_module("xgrammar")
        self._vocabulary = vocabulary
        self.num_words = vocabulary.num_words
        self._filters = Filters(vocabulary)
        end_id = vocabulary.end_id
        info = self._library.TokenizerInfo([*vocabulary.tokens, b""], vocab_size=end_id + 1, stop_token_ids=[end_id])
        self._compiler = self._library.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, text: str) -> XGrammarGrammar:
        """Raises GrammarError if xgrammar does not take the specification."""
        try:
            compiled = self._compile(kind, text)
        except (RuntimeError, ValueError, TypeError) as error:  # all that its bindings raise
            raise GrammarError(_reason(str(error))) from error
        is_json = kind in ("json", "json_object")

        def start() -> XGrammarMatcher:
            matcher = cast(_Matcher, self._library.GrammarMatcher(compiled))
            return XGrammarMatcher(matcher, self._vocabulary, self._filters, is_json=is_json)

        return XGrammarGrammar(start, _BASE_BYTES + compiled.memory_size_bytes)

    def _compile(self, kind: str, text: str) -> _Compiled:
        if kind in ("json", "json_object"):
            compiled = self._compiler.compile_json_schema(text, max_whitespace_cnt=MAX_WHITESPACE, strict_mode=False)
        elif kind == "regex":
            compiled = self._compiler.compile_regex(whole_regex(text))
        elif kind == "choice":
            compiled = self._compiler.compile_regex(choice_regex(text))
        elif is_ebnf(text):
            compiled = self._compiler.compile_grammar(self._library.Grammar.from_ebnf(text))
        else:
            compiled = self._compiler.compile_lark(text)
        return cast(_Compiled, compiled)


def _reason(message: str) -> str:
    """Its messages begin with a time and a place in its source."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "the grammar cannot be compiled")
    return (line.rpartition(".cc:")[2].partition(": ")[2] or line)[:300]
