"""What a grammar library must do for the engine. Two do: llguidance and xgrammar.

Shapes: V vocabulary (the width of the logits), W words of 32 bits that hold V + 1 bits.
"""

import hashlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fairlead.errors import ConfigError
from fairlead.tokenization.tokenizer import Tokenizer

LLGUIDANCE, XGRAMMAR = "llguidance", "xgrammar"
AUTO = "auto"


class GrammarError(ValueError):
    """The library does not take a specification, or cannot go on with one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What every token adds to the text; nothing for special tokens, which no grammar ever allows.

    The libraries are shown one token more, `end_id` = V: it is allowed exactly where the output is complete. So the
    engine decides what ends a sequence, and a model without an end-of-sequence token is no special case.
    """

    tokens: tuple[bytes, ...]
    encode: Callable[[bytes], list[int]] | None = None  # the tokenizer's own way to write UTF-8 bytes

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int] = ()) -> "Vocabulary":
        """The vocabulary of a tokenizer for logits of width `vocab_size`; ids that have no token add nothing."""
        added = tokenizer.backend.get_added_tokens_decoder()
        silent = {i for i, token in added.items() if token.special} | set(eos_token_ids)
        tokens = tuple(b"" if i in silent else tokenizer.token_bytes(i) for i in range(vocab_size))

        def encode(data: bytes) -> list[int]:
            ids = tokenizer.encode_continuation(data.decode())
            if all(i < len(tokens) for i in ids) and b"".join(tokens[i] for i in ids) == data:
                return ids
            return spell(data)

        by_bytes = {token: i for i, token in enumerate(tokens) if token}

        def spell(data: bytes) -> list[int]:
            return greedy_tokens(data, by_bytes)

        return cls(tokens=tokens, encode=encode)

    @property
    def end_id(self) -> int:
        return len(self.tokens)

    @property
    def num_words(self) -> int:
        """W."""
        return (len(self.tokens) + 32) // 32


def greedy_tokens(data: bytes, by_bytes: Mapping[bytes, int]) -> list[int]:
    """The longest token first, again and again; ends early where none fits."""
    longest = max(map(len, by_bytes), default=0)
    found: list[int] = []
    while data:
        size = next((n for n in range(min(longest, len(data)), 0, -1) if data[:n] in by_bytes), 0)
        if not size:
            break
        found.append(by_bytes[data[:size]])
        data = data[size:]
    return found


class Matcher(Protocol):
    """Where one sequence stands in its grammar."""

    def fill_bitmask(self, row_W: np.ndarray) -> None:
        """Writes the tokens that may come next into a contiguous row of int32 words: bit i of them is token i.

        Bit `end_id` is set where the output may end. Raises GrammarError if the library gives up.
        """

    def accept(self, token_id: int) -> bool:
        """Goes on by one token; False, and of no more use, if the grammar does not allow it."""

    @property
    def is_finished(self) -> bool:
        """Whether the output is complete and nothing can follow."""

    def fork(self) -> "Matcher":
        """A matcher of its own that stands at the same place."""


class Grammar(Protocol):
    """A compiled specification; shared by all sequences that ask for it."""

    size_bytes: int  # about what it holds in memory

    def start(self) -> Matcher: ...


class Backend(Protocol):
    """One library, bound to one vocabulary."""

    name: str
    num_words: int  # W

    def compile(self, kind: str, text: str) -> Grammar:
        """Raises GrammarError if the library does not take the specification."""


def installed_backends() -> tuple[str, ...]:
    """The libraries that are there, the preferred one first. None of them is imported."""
    return tuple(name for name in (XGRAMMAR, LLGUIDANCE) if importlib.util.find_spec(name) is not None)


def backend_names(wanted: str) -> tuple[str, ...]:
    """The libraries to use, in order of preference. Raises ConfigError if the wanted one is missing.

    xgrammar brings llguidance along, for the schemas that it would only follow in part.
    """
    installed = installed_backends()
    if wanted == AUTO:
        return installed
    if wanted not in installed:
        raise ConfigError(
            f"structured_outputs_backend {wanted!r} is not installed (there is {', '.join(installed) or 'none'}); "
            f"install fairlead[{wanted}]"
        )
    return (wanted, *(name for name in installed if name != wanted and wanted == XGRAMMAR))


def create_backend(name: str, vocabulary: Vocabulary) -> Backend:
    """Imports the library and shows it the vocabulary."""
    if name == XGRAMMAR:
        from fairlead.sampling.structured.xgrammar_backend import XGrammarBackend

        return XGrammarBackend(vocabulary)
    from fairlead.sampling.structured.llguidance_backend import LLGuidanceBackend

    return LLGuidanceBackend(vocabulary)


def choose_backend(names: tuple[str, ...], kind: str, text: str) -> str:
    """The preferred library that knows everything the specification uses; the last resort is not asked."""
    from fairlead.sampling.structured.schema import xgrammar_knows

    if names[0] == XGRAMMAR and len(names) > 1 and kind == "json" and not xgrammar_knows(text):
        return names[1]
    return names[0]


def digest_of(backend: str, kind: str, text: str) -> bytes:
    """The key of a specification in caches."""
    return hashlib.sha256(f"{backend}\n{kind}\n{text}".encode()).digest()


def choice_regex(text: str) -> str:
    """A regex that matches exactly the choices of a JSON list of texts."""
    import json

    return "|".join("".join(_escaped(char) for char in choice) for choice in json.loads(text))


def _escaped(char: str) -> str:
    return f"\\{char}" if char in "\\^$.|?*+()[]{}-/&~#" else char


def whole_regex(text: str) -> str:
    """A regex without the anchors at its ends, which say nothing: the whole output must match in any case."""
    text = text.removeprefix("^")
    body = text.removesuffix("$")
    num_backslashes = len(body) - len(body.rstrip("\\"))
    return body if num_backslashes % 2 == 0 else text


def is_ebnf(grammar: str) -> bool:
    """Whether a grammar is in EBNF rather than in Lark's syntax."""
    return "::=" in grammar
