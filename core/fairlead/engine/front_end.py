"""What turns text into requests: a model's tokenizer, chat template and sampling defaults. No torch, no weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairlead.checkpoint import Checkpoint
from fairlead.config import EngineConfig
from fairlead.errors import CheckpointError, ConfigError, RequestError
from fairlead.request import EngineInfo, Request, SamplingParams
from fairlead.tokenization.chat_template import ChatOptions, ChatPrompt, encode_chat
from fairlead.tokenization.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEnd:
    """The part of a model that needs no device. `tokenizer` is None under skip_tokenizer_init.

    `default_max_tokens` is the max_tokens of `default_sampling_params` where the model's own files set it, else None.
    """

    tokenizer: Tokenizer | None
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    default_sampling_params: SamplingParams
    default_max_tokens: int | None = None

    @classmethod
    def open(cls, config: EngineConfig) -> "FrontEnd":
        """Reads the model's files. Raises ModelError or ConfigError with one line that says what is wrong."""
        model = config.model
        checkpoint = Checkpoint.open(model)
        tokenizer = None
        if not model.skip_tokenizer_init:
            tokenizer = load_tokenizer(model.tokenizer or checkpoint.directory, revision=model.revision)
            _check_vocabulary(tokenizer, checkpoint)
        own_eos = () if tokenizer is None else tokenizer.eos_token_ids
        given = checkpoint.sampling_defaults() if model.generation_config == "auto" else {}
        return cls(
            tokenizer=tokenizer,
            chat_template=None if model.chat_template is None else _read_template(model.chat_template),
            eos_token_ids=tuple(dict.fromkeys((*checkpoint.eos_token_ids, *own_eos))),
            default_sampling_params=_sampling_defaults(given),
            default_max_tokens=given.get("max_tokens"),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises RequestError without a tokenizer."""
        return self._tokenizer().encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a prompt that came as token ids. Raises RequestError without a tokenizer."""
        return self._tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def encode_chat(self, messages: list[dict[str, Any]], options: ChatOptions | None = None) -> ChatPrompt:
        """A chat as text and token ids. Raises RequestError without a tokenizer or a fitting template."""
        options = options or ChatOptions()
        return encode_chat(
            self._tokenizer(),
            messages,
            template=options.template or self.chat_template,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            template_kwargs=options.template_kwargs,
            add_special_tokens=options.add_special_tokens,
        )

    def request(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        info: EngineInfo,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Request:
        """Makes a request that the engine of `info` can run, its prompt truncated as params ask.

        Raises RequestError if it cannot.
        """
        size = params.truncate_prompt_tokens
        if size is not None:
            size = size if size > 0 else max(info.max_model_len - (params.max_tokens or 1), 1)
            prompt = prompt[-size:]
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            params=params,
            eos_token_ids=self.eos_token_ids,
            cache_salt=cache_salt,
            priority=priority,
            bad_words_token_ids=self._spellings(params.bad_words),
        )
        request.check(max_model_len=info.max_model_len, vocab_size=info.vocab_size, max_num_seqs=info.max_num_seqs)
        return request

    def _spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token ids of each word, and of the word behind a space where that is as many, but other, tokens."""
        if words and self.tokenizer is None:
            raise RequestError("bad_words need a tokenizer; use logit_bias without one", param="bad_words")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip() or word
            plain = self._token_ids(bare)
            spaced = self._token_ids(" " + bare)
            if not plain:
                raise RequestError(f"bad_words: {word!r:.100} is no token", param="bad_words")
            found[plain] = None
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                found[spaced] = None
        return tuple(found)

    def _token_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer().encode(text, add_special_tokens=False))

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("the model was loaded without a tokenizer; give token ids", param="prompt")
        return self.tokenizer


def _read_template(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template {path!r} cannot be read: {error}") from error


def _sampling_defaults(given: dict[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(f"generation_config.json: {error}; --generation-config fairlead ignores that file") from error


def _check_vocabulary(tokenizer: Tokenizer, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError if the tokenizer gives ids that the model has no embedding for.

    Embeddings may be padded, and tokens that were added for other uses (images, padding) may lie beyond them.
    """
    declared = checkpoint.config.get("padded_vocab_size") or checkpoint.config.get("vocab_size")
    num_tokens = tokenizer.backend.get_vocab_size(with_added_tokens=False)
    if isinstance(declared, int) and num_tokens > declared:
        raise CheckpointError(
            f"{checkpoint.directory}: the tokenizer has {num_tokens} tokens, but config.json has a vocab_size of "
            f"{declared}; give the tokenizer that belongs to the model with --tokenizer"
        )
