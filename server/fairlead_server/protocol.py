"""Bodies of the requests, as pydantic models. Types are strict ("1" is no number), and null means "not given".

Fields that are not declared here are allowed; `unsupported` refuses those that would change the answer.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fairlead.errors import RequestError
from fairlead.request import MAX_LOGPROBS, SamplingParams
from fairlead.tokenization.chat_template import ChatOptions
from fairlead_server.structured import structured_outputs
from fairlead_server.unsupported import refuse_unsupported

MAX_PROMPTS = 1024
_SAMPLING_FIELDS = (
    "n",
    "best_of",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "logit_bias",
    "allowed_token_ids",
    "logits_processors",
    "use_beam_search",
    "length_penalty",
    "early_stopping",
    "truncate_prompt_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be valid Unicode, without lone surrogates") from error
    return text


Text = Annotated[str, AfterValidator(_whole_characters)]
Temperature = Annotated[float | None, Field(ge=0, le=2)]
RequestId = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,128}$")]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Body):
    """What a stream reports beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(_Body):
    """What completions and chat completions share."""

    model: Text | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: Temperature = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[Text] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    logits_processors: list[Text] | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    cache_salt: Text | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    request_id: RequestId | None = None
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def check(self) -> None:
        """Raises RequestError on fields that contradict each other or that the engine cannot honour."""
        refuse_unsupported(self.model_extra or {})
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream=true", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be streamed", param="prompt_logprobs")
        if self.stream and self.use_beam_search:
            raise RequestError("a beam search cannot be streamed", param="use_beam_search")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise RequestError("a choice among best_of sequences cannot be streamed", param="best_of")

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_on_every_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    @property
    def max_tokens_name(self) -> str:
        """The field that max_tokens came in."""
        return "max_tokens"

    def _sampling_params(
        self, defaults: SamplingParams, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None
    ) -> SamplingParams:
        """The request's own values over the defaults. Raises RequestError on one that is out of range."""
        given: dict[str, Any] = {name: v for name in _SAMPLING_FIELDS if (v := getattr(self, name)) is not None}
        given["structured_outputs"] = structured_outputs(self.model_extra or {})
        return replace(defaults, **given, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: int | None = None

    @property
    def echoes_logprobs(self) -> bool:
        """Whether `logprobs` covers the prompt, too, as evaluation harnesses ask."""
        return bool(self.echo) and self.logprobs is not None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one. Raises RequestError if there are none or too many."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if isinstance(prompt[0], int):
            return [list(_ints(prompt))]
        if len(prompt) > MAX_PROMPTS:
            raise RequestError(f"prompt holds {len(prompt)} prompts, at most {MAX_PROMPTS} are taken", param="prompt")
        return [p if isinstance(p, str) else list(_ints(p)) for p in prompt]

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """How to sample; max_tokens is None where the request gave none."""
        prompt_logprobs = self.prompt_logprobs
        if self.echoes_logprobs and self.logprobs is not None:
            prompt_logprobs = max(self.logprobs, prompt_logprobs or 0)
        return self._sampling_params(
            defaults, max_tokens=self.max_tokens, logprobs=self.logprobs, prompt_logprobs=prompt_logprobs
        )


class ChatMessage(_Body):
    """One message. Further fields reach the chat template as they are."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as the chat template sees it. Raises RequestError if it has no content and needs some."""
        if self.content is None and not (self.role == "assistant" and (self.model_extra or {}).get("tool_calls")):
            raise RequestError(f"a {self.role} message needs content", param="messages")
        return {"role": self.role, **(self.model_extra or {}), "content": self.content}


class ChatPromptBody(_Body):
    """How a chat becomes a prompt; what chat completions and /tokenize share."""

    messages: list[ChatMessage]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    include_reasoning: bool | None = None
    add_special_tokens: bool | None = None

    def chat_options(self, *, trusts_template: bool) -> ChatOptions:
        """How to render the messages; with the request's own template only if it is trusted.

        Raises RequestError on one that is not, and on fields that contradict each other.
        """
        if self.chat_template is not None and not trusts_template:
            raise RequestError(
                "chat_template is not taken from requests; leave it out, or start the server with "
                "--trust-chat-template",
                param="chat_template",
            )
        if not self.messages:
            raise RequestError("messages must hold at least one message", param="messages")
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
            )
        variables = dict(self.chat_template_kwargs or {})
        for name in ("documents", "reasoning_effort"):
            if (value := getattr(self, name)) is not None:
                variables[name] = value
        return ChatOptions(
            add_generation_prompt=not self.continue_final_message and self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            template_kwargs=variables,
            add_special_tokens=bool(self.add_special_tokens),
            template=self.chat_template,
        )

    @property
    def final_text(self) -> str:
        """The text of the last message if it is the assistant's, as `echo` gives it back."""
        last = self.messages[-1]
        if last.role != "assistant" or last.content is None:
            return ""
        return last.content if isinstance(last.content, str) else "\n".join(str(p.get("text")) for p in last.content)


class ChatBody(ChatPromptBody, GenerationBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise RequestError(f"top_logprobs must be from 0 to {MAX_LOGPROBS}", param="top_logprobs")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")

    @property
    def max_tokens_name(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """How to sample; max_tokens is None where the request gave none."""
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling_params(
            defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=self.prompt_logprobs
        )


class TokenizeBody(ChatPromptBody):
    """POST /tokenize, with either a text or a chat."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] = []
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raises RequestError unless there is exactly one of the two, and on fields that would change its tokens."""
        refuse_unsupported(self.model_extra or {})
        if (self.prompt is None) == (not self.messages):
            raise RequestError("give either prompt or messages", param="prompt")


class DetokenizeBody(_Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: list[int]


def _ints(values: object) -> Iterator[int]:
    assert isinstance(values, list)
    for value in values:
        assert isinstance(value, int)
        yield value
