"""Grammars by xgrammar, which computes most of a mask when it compiles. An extra: its wheel asks for more packages."""

import importlib
from collections.abc import Callable
from typing import Protocol, cast

import numpy as np

from fairlead.sampling.structured.backend import XGRAMMAR, GrammarError, Vocabulary, choice_regex, is_ebnf, whole_regex

MAX_WHITESPACE = 2  # at each place where JSON may have some, as with llguidance


class _Matcher(Protocol):
    def fill_next_token_bitmask(self, bitmask: np.ndarray, index: int = 0) -> bool: ...

    def accept_token(self, token_id: int) -> bool: ...

    def is_completed(self) -> bool: ...

    def fork(self) -> "_Matcher": ...


class _Compiled(Protocol):
    @property
    def memory_size_bytes(self) -> int: ...


class XGrammarMatcher:
    """One sequence's place in a grammar of xgrammar."""

    def __init__(self, matcher: _Matcher, vocabulary: Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._next_W: np.ndarray | None = None  # the next mask, where `accept` had to know it

    def fill_bitmask(self, row_W: np.ndarray) -> None:
        """See Matcher."""
        if self._next_W is None:
            row_W.fill(-1)
            self._matcher.fill_next_token_bitmask(row_W[None])
        else:
            row_W[:] = self._next_W

    def accept(self, token_id: int) -> bool:
        """See Matcher."""
        self._next_W = None
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
        return XGrammarMatcher(self._matcher.fork(), self._vocabulary)


class XGrammarGrammar:
    """A compiled grammar."""

    def __init__(self, compiled: _Compiled, start: Callable[[], _Matcher], vocabulary: Vocabulary) -> None:
        self._compiled, self._start, self._vocabulary = compiled, start, vocabulary
        self.size_bytes = compiled.memory_size_bytes

    def start(self) -> XGrammarMatcher:
        """A matcher at the beginning."""
        return XGrammarMatcher(self._start(), self._vocabulary)


class XGrammarBackend:
    """xgrammar with one vocabulary. Its own cache is off, since ours is bounded by bytes."""

    name = XGRAMMAR

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._library = importlib.import_module("xgrammar")
        self._vocabulary = vocabulary
        self.num_words = vocabulary.num_words
        end_id = vocabulary.end_id
        info = self._library.TokenizerInfo([*vocabulary.tokens, b""], vocab_size=end_id + 1, stop_token_ids=[end_id])
        self._compiler = self._library.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, kind: str, text: str) -> XGrammarGrammar:
        """Raises GrammarError if xgrammar does not take the specification."""
        try:
            compiled = self._compile(kind, text)
        except (RuntimeError, ValueError, TypeError) as error:  # all that its bindings raise
            raise GrammarError(_reason(str(error))) from error
        start = cast(Callable[[], _Matcher], lambda: self._library.GrammarMatcher(compiled))
        return XGrammarGrammar(compiled, start, self._vocabulary)

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
