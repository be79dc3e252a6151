"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from fairlead.request import CompletionOutput, RequestOutput
from fairlead_server.access import tenant_of
from fairlead_server.json_route import JsonRoute
from fairlead_server.protocol import ChatBody
from fairlead_server.responses import Json, Sent, chat_logprobs, json_response, prompt_logprobs, usage_of
from fairlead_server.service import Service
from fairlead_server.streaming import EventStream


class ChatCompletion:
    """One call, and how its answers are spelt."""

    def __init__(self, service: Service, body: ChatBody, request_id: str) -> None:
        self._body = body
        self._tokenizer = None if body.return_tokens_as_token_ids else service.engine.front_end.tokenizer
        self._echo = body.final_text if body.echo else ""
        self._id, self._created = f"chatcmpl-{body.request_id or request_id}", int(time.time())
        self._model = service.model_name(body.model)

    def whole(self, output: RequestOutput) -> Json:
        """The answer as one body."""
        choices: list[Json] = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": self._echo + choice.text},
                "logprobs": self._logprobs(choice, 0),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                **self._token_ids(choice, 0),
            }
            for choice in output.outputs
        ]
        whole = {**self._head("chat.completion"), "choices": choices, "usage": usage_of([output])}
        if output.prompt_logprobs is not None:
            whole["prompt_logprobs"] = prompt_logprobs(output)
        return {**whole, **self._prompt_token_ids(output)}

    async def chunks(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> AsyncGenerator[object, None]:
        """The answer piece by piece: per choice first its role, last its finish_reason."""
        head = self._head("chat.completion.chunk")
        sent = [Sent() for _ in range(self._body.n or 1)]
        output = None
        async for _, output in outputs:
            if not sent[0].started:
                for index, choice in enumerate(sent):
                    choice.started = True
                    prompt = self._prompt_token_ids(output)
                    usage = self._running_usage(replace(output, outputs=()))
                    yield {**head, "choices": [_delta(index, {"role": "assistant", "content": ""})], **prompt, **usage}
                    if self._echo:
                        yield {**head, "choices": [_delta(index, {"content": self._echo})], **usage}
            for found in output.outputs:
                for piece in self._pieces(found, sent[found.index]):
                    yield {**head, "choices": [piece], **self._running_usage(output)}
        if self._body.include_usage and output is not None:
            yield {**head, "choices": [], "usage": usage_of([output])}

    def _pieces(self, choice: CompletionOutput, sent: Sent) -> list[Json]:
        if sent.finished:
            return []
        text, first_token = sent.advance(choice)
        sent.finished = choice.finished
        pieces: list[Json] = []
        logprobs = self._logprobs(choice, first_token)
        token_ids = self._token_ids(choice, first_token)
        if text or (logprobs is not None and logprobs["content"]) or token_ids.get("token_ids"):
            pieces.append({**_delta(choice.index, {"content": text}), "logprobs": logprobs, **token_ids})
        if choice.finished:
            end = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            pieces.append({**_delta(choice.index, {}), **end})
        return pieces

    def _token_ids(self, choice: CompletionOutput, first_token: int) -> Json:
        return {"token_ids": choice.token_ids[first_token:]} if self._body.return_token_ids else {}

    def _prompt_token_ids(self, output: RequestOutput) -> Json:
        return {"prompt_token_ids": output.prompt_token_ids} if self._body.return_token_ids else {}

    def _logprobs(self, choice: CompletionOutput, first_token: int) -> Json | None:
        return chat_logprobs(choice, self._tokenizer, self._body.top_logprobs or 0, first_token=first_token)

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _running_usage(self, output: RequestOutput) -> Json:
        if self._body.usage_on_every_chunk:
            return {"usage": usage_of([output])}
        return {"usage": None} if self._body.include_usage else {}


def _delta(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def router(service: Service) -> APIRouter:
    """The route of chats."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        service.model_name(body.model)
        body.check()
        params = body.sampling_params(service.engine.default_sampling_params)
        prompt = await service.engine.encode_chat(
            [message.for_template() for message in body.messages],
            body.chat_options(trusts_template=service.config.trust_chat_template),
        )
        request = service.request(prompt.token_ids, params, body, tenant=tenant_of(http), default_max_tokens=None)
        answer = ChatCompletion(service, body, http.state.request_id)
        generation = service.start([request], http)
        try:
            if body.stream:
                outputs = await generation.started()
                return EventStream(answer.chunks(outputs), generation)
            [output] = await generation.finished()
            return json_response(answer.whole(output))
        except BaseException:
            generation.close()
            raise

    return routes
