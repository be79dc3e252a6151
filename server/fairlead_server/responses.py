"""Parts that the bodies of several answers share."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import msgspec
from fastapi import Response

from fairlead.request import CompletionOutput, Logprob, RequestOutput
from fairlead.tokenization.tokenizer import Tokenizer

Json = dict[str, Any]
MIN_LOGPROB = -9999.0  # JSON has no infinity

_encoder = msgspec.json.Encoder()


def encode_json(value: object) -> bytes:
    """The value as JSON."""
    return _encoder.encode(value)


def json_response(body: Json) -> Response:
    """A whole answer."""
    return Response(encode_json(body), media_type="application/json")


def usage_of(outputs: Iterable[RequestOutput]) -> Json:
    """Token counts; a prompt counts once, however many continuations it has."""
    outputs = list(outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }


@dataclass(slots=True)
class Sent:
    """How much of one choice has been streamed. `offset` is where the text of its next token begins."""

    offset: int = 0
    num_chars: int = 0
    num_tokens: int = 0
    started: bool = False
    finished: bool = False

    def advance(self, choice: CompletionOutput) -> tuple[str, int]:
        """What is new: its text, and the index of its first token."""
        text, first_token = choice.text[self.num_chars :], self.num_tokens
        self.num_chars, self.num_tokens = len(choice.text), len(choice.token_ids)
        return text, first_token


Entries = Seq[dict[int, Logprob] | None]
"""Log-probabilities token by token, of a prompt: None for its first one."""


def completion_logprobs(
    choice: CompletionOutput,
    tokenizer: Tokenizer | None,
    *,
    first_token: int = 0,
    offset: int = 0,
    prompt: tuple[Seq[int], Entries] = ((), ()),
) -> Json | None:
    """Log-probabilities from `first_token` on, as /v1/completions spells them; `offset` is where its text begins.

    The tokens of an echoed `prompt`, as far as given, come first.
    """
    if choice.logprobs is None:
        return None
    found = [*zip(*prompt, strict=True), *zip(choice.token_ids, choice.logprobs, strict=True)]
    del found[len(prompt[0]) : len(prompt[0]) + first_token]
    texts = [_text(token_id, tokenizer) for token_id, _ in found]
    return {
        "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
        "token_logprobs": [None if best is None else _value(best[token_id]) for token_id, best in found],
        "tokens": texts,
        "top_logprobs": [None if best is None else _by_text(best, tokenizer) for _, best in found],
    }


def prompt_logprobs(output: RequestOutput) -> list[Json | None] | None:
    """The prompt's log-probabilities by token id, as vLLM spells them."""
    if output.prompt_logprobs is None:
        return None
    return [
        None if best is None else {str(token_id): _prompt_entry(entry) for token_id, entry in best.items()}
        for best in output.prompt_logprobs
    ]


def _prompt_entry(entry: Logprob) -> Json:
    return {"logprob": _value(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}


def chat_logprobs(
    choice: CompletionOutput, tokenizer: Tokenizer | None, num_top: int, *, first_token: int = 0
) -> Json | None:
    """Log-probabilities from `first_token` on, as /v1/chat/completions spells them."""
    if choice.logprobs is None:
        return None
    found = list(zip(choice.token_ids, choice.logprobs, strict=True))[first_token:]
    return {
        "content": [
            {**_chat_entry(token_id, best[token_id], tokenizer), "top_logprobs": _top(best, tokenizer, num_top)}
            for token_id, best in found
        ]
    }


def _top(best: Mapping[int, Logprob], tokenizer: Tokenizer | None, num_top: int) -> Seq[Json]:
    ranked = sorted(best.items(), key=lambda item: item[1].rank)[:num_top]
    return [_chat_entry(token_id, entry, tokenizer) for token_id, entry in ranked]


def _chat_entry(token_id: int, entry: Logprob, tokenizer: Tokenizer | None) -> Json:
    return {
        "token": _text(token_id, tokenizer),
        "logprob": _value(entry),
        "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token_id)),
    }


def _by_text(best: Mapping[int, Logprob], tokenizer: Tokenizer | None) -> dict[str, float]:
    """The sampled token comes first in `best`, so where two tokens have one text, its value stays."""
    found: dict[str, float] = {}
    for token_id, entry in best.items():
        found.setdefault(_text(token_id, tokenizer), _value(entry))
    return found


def _text(token_id: int, tokenizer: Tokenizer | None) -> str:
    return f"token_id:{token_id}" if tokenizer is None else tokenizer.token_text(token_id)


def _value(entry: Logprob) -> float:
    return max(entry.logprob, MIN_LOGPROB)
