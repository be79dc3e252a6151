"""What turns text into requests: a model's tokenizer, chat template and sampling defaults. No torch, no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairlead.checkpoint import Checkpoint
from fairlead.config import EngineConfig
from fairlead.errors import ConfigError, RequestError
from fairlead.request import SamplingParams
from fairlead.tokenization.chat_template import ChatPrompt, encode_chat
from fairlead.tokenization.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEnd:
    """The part of a model that needs no device. `tokenizer` is None under skip_tokenizer_init."""

    tokenizer: Tokenizer | None
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    default_sampling_params: SamplingParams

    @classmethod
    def open(cls, config: EngineConfig) -> "FrontEnd":
        """Reads the model's files. Raises ModelError or ConfigError with one line that says what is wrong."""
        model = config.model
        checkpoint = Checkpoint.open(model)
        tokenizer = None
        if not model.skip_tokenizer_init:
            tokenizer = load_tokenizer(model.tokenizer or checkpoint.directory, revision=model.revision)
        own_eos = () if tokenizer is None else tokenizer.eos_token_ids
        use_defaults = model.generation_config == "auto"
        return cls(
            tokenizer=tokenizer,
            chat_template=None if model.chat_template is None else _read_template(model.chat_template),
            eos_token_ids=tuple(dict.fromkeys((*checkpoint.eos_token_ids, *own_eos))),
            default_sampling_params=_sampling_defaults(checkpoint) if use_defaults else SamplingParams(),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises RequestError without a tokenizer."""
        return self._tokenizer().encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a prompt that came as token ids. Raises RequestError without a tokenizer."""
        return self._tokenizer().decode(token_ids)

    def encode_chat(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> ChatPrompt:
        """A chat as text and token ids. Raises RequestError without a tokenizer or a fitting template."""
        return encode_chat(
            self._tokenizer(), messages, template=self.chat_template, add_generation_prompt=add_generation_prompt
        )

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("the model was loaded without a tokenizer; give token ids", param="prompt")
        return self.tokenizer


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template {path!r} cannot be read: {error}") from error


def _sampling_defaults(checkpoint: Checkpoint) -> SamplingParams:
    try:
        return SamplingParams(**checkpoint.sampling_defaults())
    except RequestError as error:
        raise ConfigError(f"generation_config.json: {error}; --generation-config fairlead ignores that file") from error
