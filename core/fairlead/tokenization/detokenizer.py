"""Token ids to text, one step at a time: UTF-8 safe, and with stop strings.

The text of a sequence is what decoding prompt and output at once adds to decoding the prompt,

    decode(prompt + output)  minus  its longest common prefix with  decode(prompt),

so SentencePiece's space between prompt and output is kept, and a character that the prompt began and the output
completes is the output's. (Of a run of byte-fallback tokens that spans the border, the prompt keeps the characters
that it completed, whatever the output makes of the run.) Streamed or whole, the text is the same to the byte.

tokenizers' own DecodeStream cannot give that (0.23): it loses a space behind a skipped special token, raises "Invalid
prefix encountered" on invalid byte-fallback runs, never gives out an incomplete tail, and is quadratic in the length
of an invalid run. What makes an exact and linear stream possible is that decoders are local: a token's text hangs on
its neighbours only through (1) UTF-8 sequences split over ByteLevel tokens, (2) runs of ByteFallback tokens, which
become text or one U+FFFD per byte as a whole, and (3) the token right before it (SentencePiece's first space,
WordPiece's joints). A decoder with a step that looks further (Strip of several characters, a Replace of longer strings
behind Fuse) is decoded by the same rules; we know no language model that has one.
"""

import codecs
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

from fairlead.request import SamplingParams
from fairlead.tokenization.tokenizer import Tokenizer

_REPLACEMENT = "�"
_LONGEST_SEQUENCE = 4  # bytes of a UTF-8 character


class Detokenizer:
    """The growing text of one sequence.

    `num_tokens` counts the tokens that make up the text; `stop` is the stop string that ended it. Characters that may
    yet become part of a stop string are held back until that is decided. A stop string counts from the token at which
    its text is certain, so a push may go further than `num_tokens`: the tokens behind are not part of the sequence.
    One that the first `min_tokens` tokens complete does not count.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Seq[int], params: SamplingParams) -> None:
        make = _ByteLevelStream if tokenizer.is_byte_level else _WindowStream
        self._stream: _Stream = make(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = _StopScanner(params.stop) if params.stop else None
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._parts: list[str] = []
        self._held = ""
        self.num_tokens = 0
        self.stop: str | None = None

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Seq[int]) -> str:
        """Takes the next tokens; returns the text that became certain. Stops at a stop string, and stays so."""
        start = len(self._parts)
        for token_id in token_ids:
            if self.stop is not None:
                break
            self.num_tokens += 1
            self._add(self._stream.push(token_id))
        return "".join(self._parts[start:])

    def finish(self) -> str:
        """Ends the sequence; returns what was held back. A stop string may still appear."""
        start = len(self._parts)
        if self.stop is None:
            self._add(self._stream.finish())
            self._parts.append(self._held)
            self._held = ""
        return "".join(self._parts[start:])

    def _add(self, piece: str) -> None:
        if self._stops is None or not piece:
            self._parts.append(piece)
            return
        window = self._held + piece
        match = self._stops.scan(piece, counts=self.num_tokens > self._min_tokens)
        if match is None:
            cut = len(window) - self._stops.num_held
        else:
            self.stop = match.stop
            cut = len(window) - (match.end_before if self._include_stop else match.start_before)
        self._parts.append(window[:cut])
        self._held = window[cut:] if match is None else ""


class _Match(NamedTuple):
    """A stop string and where it lies, in characters before the end of what was scanned."""

    start_before: int
    end_before: int
    stop: str


class _StopScanner:
    """Finds stop strings in a text that comes in pieces; each character is looked at a constant number of times.

    The earliest start within a piece wins, then the shorter string. Source: Knuth, Morris, Pratt, "Fast Pattern
    Matching in Strings" (1977), section 2, one automaton per string.
    """

    def __init__(self, stops: Seq[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in dict.fromkeys(stops)]
        self._matched = [0] * len(self._stops)  # of each string, how many characters the text ends with
        self._firsts = frozenset(stop[0] for stop in stops)
        self.num_held = 0  # characters at the end of the text that may become part of a stop string

    def scan(self, piece: str, *, counts: bool = True) -> _Match | None:
        """Takes the next piece; returns the match that it completes, if matches count yet."""
        if not self.num_held and self._firsts.isdisjoint(piece):
            return None
        found = [match for i in range(len(self._stops)) if (match := self._scan_one(i, piece, counts))]
        self.num_held = max(self._matched)
        return max(found, default=None, key=lambda match: match[:2])

    def _scan_one(self, index: int, piece: str, counts: bool) -> _Match | None:
        (stop, borders), matched = self._stops[index], self._matched[index]
        for i, char in enumerate(piece):
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            if stop[matched] == char:
                matched += 1
            if matched == len(stop) and not counts:
                matched = borders[-1]
            elif matched == len(stop):
                end_before = len(piece) - i - 1
                return _Match(end_before + len(stop), end_before, stop)
        self._matched[index] = matched
        return None


def _borders(pattern: str) -> list[int]:
    """Of each prefix, the length of its longest proper border (Knuth, Morris and Pratt's failure function)."""
    borders = [0] * len(pattern)
    size = 0
    for i in range(1, len(pattern)):
        while size and pattern[i] != pattern[size]:
            size = borders[size - 1]
        if pattern[i] == pattern[size]:
            size += 1
        borders[i] = size
    return borders


class _Stream(Protocol):
    """Tokens in, certain text out."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _Border:
    """Takes off the first text what the prompt's text has of it already."""

    def __init__(self, prompt_tail: str) -> None:
        self._prompt_tail = prompt_tail

    def cross(self, text: str) -> str:
        if self._prompt_tail and text:
            differs = (i for i, (old, new) in enumerate(zip(self._prompt_tail, text, strict=False)) if old != new)
            text = text[next(differs, min(len(self._prompt_tail), len(text))) :]
            self._prompt_tail = ""
        return text


class _ByteLevelStream:
    """For the ByteLevel decoder, whose text is the tokens' bytes as UTF-8, invalid ones replaced."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Seq[int], skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if len(tail) >= _LONGEST_SEQUENCE:
                break
            if token_id not in self._skipped:
                tail = self._bytes_of(token_id) + tail
        self._decoder.decode(tail)
        # Not always one U+FFFD: the first two bytes of a surrogate are held, and yet are two invalid ones.
        self._border = _Border(self._decoder.getstate()[0].decode("utf-8", "replace"))

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._border.cross(self._decoder.decode(self._bytes_of(token_id)))

    def finish(self) -> str:
        return self._border.cross(self._decoder.decode(b"", final=True))


class _WindowStream:
    """For every other decoder: decodes each token behind the one before it, and a run of byte tokens as a whole.

    ... prompt ...  anchor | open tokens
                           ^ everything before is given out
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Seq[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._anchor: list[int] = []  # the last visible token given out; at most one
        run: list[int] = []
        for token_id in filter(self._is_visible, reversed(prompt_token_ids)):
            if not tokenizer.is_byte_token(token_id):
                self._anchor = [token_id]
                break
            run.append(token_id)
        if run and not self._anchor:
            self._anchor = [tokenizer.anchor_id]  # byte tokens are text, so what follows is no start
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        utf8.decode(b"".join(map(tokenizer.token_bytes, reversed(run))))
        num_open = len(utf8.getstate()[0])
        self._open = list(reversed(run[:num_open]))
        self._border = _Border(_REPLACEMENT * num_open)

    def push(self, token_id: int) -> str:
        if not self._is_visible(token_id):
            return ""
        self._open.append(token_id)
        if self._tokenizer.is_byte_token(token_id):
            return ""
        text = self._decode_open()
        self._anchor, self._open = [token_id], []
        return self._border.cross(text)

    def finish(self) -> str:
        text, self._open = self._decode_open(), []
        return self._border.cross(text)

    def _is_visible(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._tokenizer.backend.id_to_token(token_id) is not None

    def _decode_open(self) -> str:
        before = self._tokenizer.decode(self._anchor, skip_special_tokens=False)
        return self._tokenizer.decode(self._anchor + self._open, skip_special_tokens=False)[len(before) :]
