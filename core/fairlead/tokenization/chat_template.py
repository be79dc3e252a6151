"""Chat messages to a prompt, through transformers' chat templates (sandboxed Jinja).

What a caller writes stays text. The spelling of a control token in a message, a tool or a template variable is wrapped
into two markers before the template is rendered; the rendered text is then encoded in chunks that are cut inside each
wrapped spelling, so no chunk holds it whole and only the template's own control tokens are found. The markers lie
around the spelling, not in it, because templates search messages for some of them ("</think>").

Control tokens are the special ones, and those added tokens that the template itself spells out. Limits: a template that
builds a control token from a caller's string (`'<|' + role + '|>'`) needs that string checked before, and an added
token that is matched on normalised text is only found as it is spelt.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fairlead.errors import RequestError
from fairlead.tokenization.time_limit import TimeLimitError, time_limit
from fairlead.tokenization.tokenizer import Tokenizer

TEMPLATE_S = 2.0  # of computing; a chat of 30,000 messages takes 0.5
_FIRST_NONCHARACTER, _LAST_NONCHARACTER = 0xFDD0, 0xFDEF  # Unicode keeps these for a program's own use


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A rendered chat and its token ids."""

    text: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How messages become a prompt. `template_kwargs` are variables that the template may read.

    `template` is a Jinja source that replaces every other one. It is a program: it must come from somebody trusted.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False
    template: str | None = None


def render_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt of a chat as text. `template` is a Jinja source that replaces the tokenizer's own.

    A content given as text parts becomes their texts, a line each. Encoding the result again would let a caller's text
    turn into control tokens; use `encode_chat` for that. Raises RequestError.
    """
    options: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    source = _template_source(tokenizer, template, tools)
    return _render(tokenizer, source, _normalised(messages), tools, dict(template_kwargs or {}), options)


def encode_chat(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_special_tokens: bool = False,
) -> ChatPrompt:
    """The prompt of a chat as text and token ids; the text of control tokens in it stays text. Raises RequestError.

    `add_special_tokens` adds those that the tokenizer puts around a text to the ones that the template writes.
    """
    options: dict[str, Any] = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
    }
    source = _template_source(tokenizer, template, tools)
    messages, variables = _normalised(messages), dict(template_kwargs or {})
    control = _control_tokens(tokenizer, source)
    written = "\0".join(_strings([messages, tools, variables]))
    if not control or not _pattern(control).search(written):
        text = _render(tokenizer, source, messages, tools, variables, options)
        return ChatPrompt(text=text, token_ids=tokenizer.encode(text, add_special_tokens=add_special_tokens))
    markers = _free_markers(written)
    messages, tools, variables = _marked([messages, tools, variables], _pattern(control), markers)
    rendered = _render(tokenizer, source, messages, tools, variables, options)
    chunks = _cut(rendered, control, markers)
    token_ids = tokenizer.encode(chunks[0], add_special_tokens=add_special_tokens)
    for chunk in chunks[1:]:
        token_ids += tokenizer.encode_continuation(chunk)
    return ChatPrompt(text="".join(chunks), token_ids=token_ids)


def _template_source(tokenizer: Tokenizer, template: str | None, tools: list[dict[str, Any]] | None) -> str:
    own = tokenizer.transformers_tokenizer.chat_template
    if template is not None:
        return own.get(template, template) if isinstance(own, dict) else template
    if isinstance(own, dict):
        own = own.get("tool_use" if tools and "tool_use" in own else "default")
    if own is None:
        raise RequestError("the model has no chat template; give one with --chat-template", param="messages")
    return own


def _normalised(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages must be a list of at least one message, got {messages!r:.100}", param="messages")
    found = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"a message must be an object with a role, got {message!r:.100}", param="messages")
        found.append({**message, "content": _joined(message["content"])} if "content" in message else dict(message))
    return found


def _joined(content: object) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(
            f"a message's content must be text or a list of parts, got {content!r:.100}", param="messages"
        )
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            message = f'a message\'s content takes parts {{"type": "text", "text": …}} only, got {kind!r:.100}'
            raise RequestError(message, param="messages")
        texts.append(part["text"])
    return "\n".join(texts)


def _render(
    tokenizer: Tokenizer,
    source: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    template_kwargs: dict[str, Any],
    options: dict[str, Any],
) -> str:
    fixed = {"chat_template": source, "tools": tools or None, "tokenize": False, **options}
    taken = {*fixed, *inspect.signature(tokenizer.transformers_tokenizer.apply_chat_template).parameters} - {
        "documents"
    }
    for name in template_kwargs:
        if name in taken:
            raise RequestError(
                f"{name} is no template variable; it has its own parameter", param="chat_template_kwargs"
            )
    try:
        with time_limit(TEMPLATE_S):
            rendered = tokenizer.transformers_tokenizer.apply_chat_template(messages, **{**template_kwargs, **fixed})
    except TimeLimitError as error:
        message = f"the chat template did not end within {TEMPLATE_S:g} s on these messages"
        raise RequestError(message, param="messages") from error
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RequestError(f"the chat template refuses these messages: {reason}", param="messages") from error
    return str(rendered)


def _control_tokens(tokenizer: Tokenizer, source: str) -> tuple[str, ...]:
    found = [
        token for token, special in tokenizer.added_tokens.items() if special or (token in source and token.strip())
    ]
    return tuple(sorted(filter(None, found), key=len, reverse=True))  # of two that start alike, the longer is meant


@lru_cache(maxsize=16)
def _pattern(control: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, control)))


@lru_cache(maxsize=16)
def _start_pattern(control: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the first character of each control token, also where they overlap."""
    return re.compile(f"(?={_pattern(control).pattern}).", re.DOTALL)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _free_markers(written: str) -> tuple[str, str]:
    """Two characters that the caller has not used."""
    free = [chr(c) for c in range(_FIRST_NONCHARACTER, _LAST_NONCHARACTER + 1) if chr(c) not in written]
    if len(free) < 2:
        raise RequestError("the messages hold control tokens and all Unicode noncharacters; leave these out")
    return free[0], free[1]


def _marked(value: Any, pattern: re.Pattern[str], markers: tuple[str, str]) -> Any:
    """The same data with every control token in it wrapped into the markers."""
    if isinstance(value, str):
        return pattern.sub(lambda match: markers[0] + match[0] + markers[1], value)
    if isinstance(value, Mapping):
        return {_marked(key, pattern, markers): _marked(item, pattern, markers) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_marked(item, pattern, markers) for item in value]
    return value


def _cut(rendered: str, control: tuple[str, ...], markers: tuple[str, str]) -> list[str]:
    """Splits a rendered chat so that no chunk holds a wrapped control token whole.

    The cuts are behind the first character of each control token that starts in a wrapped one, and at every marker;
    one that has lost its partner (the template split the text there) keeps both sides from joining to a control token.
    """
    opening, closing = markers

    def split_token(match: re.Match[str]) -> str:
        if len(match[1]) == 1:
            raise RequestError(f"the messages hold the control character {match[1]!r}; leave it out", param="messages")
        return opening + _start_pattern(control).sub(lambda start: start[0] + opening, match[1]) + closing

    wrapped = re.compile(f"{opening}({_pattern(control).pattern}){closing}")
    chunks = re.split(f"[{opening}{closing}]", wrapped.sub(split_token, rendered))
    return [chunks[0], *filter(None, chunks[1:])]
