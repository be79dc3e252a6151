"""Offline inference in this process: `LLM`. Needs no server package."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm import tqdm

from fairlead.config import EngineConfig
from fairlead.engine.engine import EngineCore
from fairlead.engine.front_end import FrontEnd
from fairlead.engine.output_processor import OutputProcessor
from fairlead.errors import ConfigError, RequestError
from fairlead.request import EngineInfo, Request, RequestOutput, SamplingParams
from fairlead.tokenization.chat_template import ChatOptions
from fairlead.tokenization.tokenizer import Tokenizer

Prompt = str | list[int] | Mapping[str, Any]
"""A text, its token ids, or {"prompt": text} or {"prompt_token_ids": [...]}."""

Message = dict[str, Any]
"""One chat message: {"role": ..., "content": ...}."""


class LLM:
    """Loads a model and generates from it; the arguments are vLLM's, and any other setting of EngineConfig.

    A name that vLLM has and that changes nothing here (enable_chunked_prefill, say) is accepted. Raises ConfigError
    for an unknown one.
    """

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        self.config = EngineConfig.of(model=str(model), **settings)
        self.front_end = FrontEnd.open(self.config)
        self.engine = EngineCore(self.config)
        self._outputs = OutputProcessor(self.front_end.tokenizer)
        self._latest: dict[str, RequestOutput] = {}
        self._num_streams = 0
        self._ids = itertools.count()

    @property
    def info(self) -> EngineInfo:
        """What was loaded, and where it runs."""
        return self.engine.info

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ConfigError if none was loaded."""
        if self.front_end.tokenizer is None:
            raise ConfigError("this LLM was made with skip_tokenizer_init=True and has no tokenizer")
        return self.front_end.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (generation_config.json), unless generation_config="fairlead"."""
        return self.front_end.default_sampling_params

    def generate(
        self,
        prompts: Prompt | list[Prompt] | list[str] | list[list[int]] | list[Mapping[str, Any]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Iterable[int] | None = None,
    ) -> list[RequestOutput]:
        """Completes one prompt or a list of them, batched; outputs come in the order of the prompts.

        One SamplingParams serves all prompts, a list gives each its own. `priority` has a number for each prompt, lower
        first, under `scheduling_policy="priority"`. Raises RequestError before anything runs if one of them is invalid.
        """
        batch = _as_list(prompts)
        priorities = [0] * len(batch) if priority is None else list(priority)
        if len(priorities) != len(batch):
            raise RequestError(f"there are {len(batch)} prompts, but {len(priorities)} priorities", param="priority")
        requests = [
            self._request(prompt, params, priority)
            for prompt, params, priority in zip(
                batch, self._params(sampling_params, len(batch)), priorities, strict=True
            )
        ]
        return self._run(requests, use_tqdm=use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the model's chat template."""
        chats = [messages] if messages and isinstance(messages[0], dict) else messages
        requests = [
            self._request(self._chat_prompt(chat, add_generation_prompt), params)
            for chat, params in zip(chats, self._params(sampling_params, len(chats)), strict=True)
        ]
        return self._run(requests, use_tqdm=use_tqdm)

    def generate_stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Completes one prompt; yields the output so far after every step in which its tokens grew.

        Closing the iterator aborts the request.
        """
        return self._stream(self._request(prompt, sampling_params or self.get_default_sampling_params()))

    def chat_stream(
        self, messages: list[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answers one conversation; yields like `generate_stream`."""
        prompt = self._chat_prompt(messages, True)
        return self._stream(self._request(prompt, sampling_params or self.get_default_sampling_params()))

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes."""
        return self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Ends what runs and frees model and cache; the LLM cannot be used afterwards."""
        self.engine.close()

    def _params(self, given: SamplingParams | Iterable[SamplingParams] | None, num: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * num
        params = list(given)
        if len(params) != num:
            raise RequestError(f"there are {num} prompts, but {len(params)} sampling_params", param="sampling_params")
        return params

    def _chat_prompt(self, messages: Any, add_generation_prompt: bool) -> Mapping[str, Any]:
        chat = self.front_end.encode_chat(messages, ChatOptions(add_generation_prompt=add_generation_prompt))
        return {"prompt": chat.text, "prompt_token_ids": chat.token_ids}

    def _request(self, prompt: Any, params: SamplingParams, priority: int = 0) -> tuple[Request, str | None]:
        text: str | None = None
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if isinstance(prompt, Mapping):
            text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        else:
            token_ids = prompt
        if token_ids is None:
            if not isinstance(text, str):
                raise RequestError(f"a prompt must be text or token ids, got {prompt!r:.100}", param="prompt")
            token_ids = self.front_end.encode(text)
        if not isinstance(token_ids, (list, tuple)) or not all(type(i) is int for i in token_ids):
            raise RequestError(f"token ids must be a list of integers, got {token_ids!r:.100}", param="prompt")
        request = self.front_end.request(str(next(self._ids)), token_ids, params, self.info, priority=priority)
        if params.structured_outputs is not None:
            self.engine.check_structured(params.structured_outputs)
        return request, text

    def _run(self, requests: list[tuple[Request, str | None]], *, use_tqdm: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        hidden = None if use_tqdm else True  # None: shown on a terminal only
        try:
            for request, text in requests:
                self._add(request, text)
            with tqdm(total=len(requests), desc="Processed prompts", disable=hidden, dynamic_ncols=True) as bar:
                ours = {request.request_id for request, _ in requests}
                while len(finished) < len(ours):
                    self._step()
                    done = [i for i, output in self._latest.items() if output.finished and i in ours]
                    finished |= {i: self._latest.pop(i) for i in done}
                    bar.update(len(done))
        finally:
            for request, _ in requests:
                self._forget(request.request_id)
        return [finished[request.request_id] for request, _ in requests]

    def _stream(self, request: tuple[Request, str | None]) -> Iterator[RequestOutput]:
        request_id = request[0].request_id
        self._add(*request)
        self._num_streams += 1
        num_tokens = 0
        try:
            while True:
                while request_id not in self._latest:
                    self._step()
                output = self._latest.pop(request_id)
                grown = sum(len(o.token_ids) for o in output.outputs)
                if grown > num_tokens or output.finished:
                    num_tokens = grown
                    yield output
                if output.finished:
                    return
        finally:
            self._num_streams -= 1
            self._forget(request_id)

    def _add(self, request: Request, text: str | None) -> None:
        self._outputs.add(request, text)
        self.engine.add_request(request)

    def _forget(self, request_id: str) -> None:
        """Ends a request that is still in flight after an error, Ctrl-C or a closed iterator."""
        self._latest.pop(request_id, None)
        if self._outputs.abort(request_id) is not None:
            self.engine.abort(request_id)

    def _step(self) -> None:
        """One step for all that is in flight: whoever steps leaves the others' outputs in `_latest`."""
        deltas = self.engine.step()
        for _, error in self.engine.take_rejected():
            raise error
        processed = self._outputs.process(deltas, only_finished=self._num_streams == 0)
        for request_id, index in processed.finish:
            self.engine.abort(request_id, index)
        self._latest.update((output.request_id, output) for output in processed.outputs)


def _as_list(prompts: Any) -> list[Any]:
    """One prompt as a list of one. A list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (list, tuple)):
        return [prompts] if prompts and all(type(i) is int for i in prompts) else list(prompts)
    raise RequestError(f"prompts must be text, token ids, or a list of them, got {prompts!r:.100}", param="prompt")
