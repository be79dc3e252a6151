"""Grammars by llguidance: derivatives of regexes under an Earley parser, which never backtrack."""

import json

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

from fairlead.sampling.structured.backend import (
    LLGUIDANCE,
    GrammarError,
    Vocabulary,
    choice_regex,
    greedy_tokens,
    is_ebnf,
    whole_regex,
)

# No endless spaces: a weak model fills its answer with them. Two make ": ", ",\n" and "{ " possible.
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,2}"
_MAX_LEXER_STATES = 20_000  # of 1 to 2 KiB each, per sequence
_BASE_BYTES, _BYTES_PER_CHAR = 160 * 1024, 64  # measured: 89 KiB for schemas of 400 characters, 137 once they have run


class _TokenizerInfo:
    """The vocabulary in the shape that LLTokenizer reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = [*vocabulary.tokens, b"<end>"]
        self.eos_token_id = vocabulary.end_id
        self.special_token_ids = [vocabulary.end_id]
        self._encode = vocabulary.encode
        self._by_bytes = {} if self._encode else {token: i for i, token in enumerate(vocabulary.tokens) if token}

    def __call__(self, text: str) -> list[int]:
        """How the tokenizer writes a text that the grammar leaves no choice about."""
        if self._encode is None:
            return greedy_tokens(text.encode(), self._by_bytes)
        return self._encode(text.encode())


class LLGuidanceMatcher:
    """One sequence's place in a grammar of llguidance."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def fill_bitmask(self, row_W: np.ndarray) -> None:
        """See Matcher."""
        self._matcher.unsafe_compute_mask_ptr(row_W.ctypes.data, row_W.nbytes)
        if self._matcher.is_error():
            raise GrammarError(first_line(self._matcher.get_error()))

    def accept(self, token_id: int) -> bool:
        """See Matcher."""
        return self._matcher.consume_token(token_id)

    @property
    def is_finished(self) -> bool:
        return self._matcher.is_stopped()

    def fork(self) -> "LLGuidanceMatcher":
        """See Matcher."""
        return LLGuidanceMatcher(self._matcher.deep_copy())


class LLGuidanceGrammar:
    """A grammar that has not started: its matchers are copies of it."""

    def __init__(self, matcher: LLMatcher, size_bytes: int) -> None:
        self._matcher = matcher
        self.size_bytes = size_bytes

    def start(self) -> LLGuidanceMatcher:
        """A matcher at the beginning."""
        return LLGuidanceMatcher(self._matcher.deep_copy())


class LLGuidanceBackend:
    """llguidance with one vocabulary."""

    name = LLGUIDANCE

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.num_words = vocabulary.num_words
        self._tokenizer = LLTokenizer(_TokenizerInfo(vocabulary))  # type: ignore[arg-type]  # it reads attributes only
        self._limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)

    def compile(self, kind: str, text: str) -> LLGuidanceGrammar:
        """Raises GrammarError if llguidance does not take the specification."""
        try:
            matcher = LLMatcher(self._tokenizer, _source(kind, text), log_level=0, limits=self._limits)
        except ValueError as error:
            raise GrammarError(first_line(str(error))) from error
        if matcher.is_error():
            raise GrammarError(first_line(matcher.get_error()))
        return LLGuidanceGrammar(matcher, _BASE_BYTES + _BYTES_PER_CHAR * len(text))


def _source(kind: str, text: str) -> str:
    if kind in ("json", "json_object"):
        options = {"whitespace_pattern": WHITESPACE, "lenient": False}
        return LLMatcher.grammar_from_json_schema(json.loads(text), overrides=options)  # type: ignore[arg-type]
    if kind == "regex":
        return LLMatcher.grammar_from_regex(whole_regex(text))
    if kind == "choice":
        return LLMatcher.grammar_from_regex(choice_regex(text))
    if not is_ebnf(text):
        return LLMatcher.grammar_from_lark(text)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text))
    except Exception as error:  # its parser raises an exception class of its own, and others on broken input
        raise GrammarError(f"the EBNF cannot be read: {first_line(str(error))}") from error


def first_line(message: str) -> str:
    """The part of a library's message that says what is wrong, short enough for an error of ours."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    return next((line for line in lines if line), "the grammar cannot be compiled")[:300]
