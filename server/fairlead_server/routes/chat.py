"""POST /v1/chat/completions."""

import time
from collections.abc import AsyncGenerator, AsyncIterator

from fastapi import APIRouter, Request, Response

from fairlead.request import CompletionOutput, RequestOutput
from fairlead_server.protocol import ChatBody
from fairlead_server.responses import Json, Sent, chat_logprobs, json_response, prompt_logprobs, usage
from fairlead_server.service import Generation, Service, unless_disconnected
from fairlead_server.streaming import EventStream


class ChatCompletion:
    """One call, and how its answers are spelt."""

    def __init__(self, service: Service, body: ChatBody, request_id: str) -> None:
        self._body = body
        self._tokenizer = service.engine.front_end.tokenizer
        self._id, self._created, self._model = f"chatcmpl-{request_id}", int(time.time()), service.model_name

    def whole(self, output: RequestOutput) -> Json:
        """The answer as one body."""
        choices: list[Json] = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": self._logprobs(choice, 0),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for choice in output.outputs
        ]
        whole = {**self._head("chat.completion"), "choices": choices, "usage": usage([output])}
        return whole if output.prompt_logprobs is None else {**whole, "prompt_logprobs": prompt_logprobs(output)}

    async def chunks(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> AsyncGenerator[object, None]:
        """The answer piece by piece: per choice first its role, last its finish_reason."""
        head = self._head("chat.completion.chunk")
        sent = [Sent() for _ in range(self._body.n or 1)]
        for index in range(len(sent)):
            choice: Json = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            yield {**head, "choices": [choice], **self._running_usage(None)}
        output = None
        async for _, output in outputs:
            for found in output.outputs:
                for piece in self._pieces(found, sent[found.index]):
                    yield {**head, "choices": [piece], **self._running_usage(output)}
        if self._body.include_usage and output is not None:
            yield {**head, "choices": [], "usage": usage([output])}

    def _pieces(self, choice: CompletionOutput, sent: Sent) -> list[Json]:
        if sent.finished:
            return []
        text, first_token = sent.advance(choice)
        sent.finished = choice.finished
        pieces: list[Json] = []
        logprobs = self._logprobs(choice, first_token)
        if text or (logprobs is not None and logprobs["content"]):
            delta = {"content": text}
            pieces.append({"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
        if choice.finished:
            end = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            pieces.append({"index": choice.index, "delta": {}, "logprobs": None, **end})
        return pieces

    def _logprobs(self, choice: CompletionOutput, first_token: int) -> Json | None:
        return chat_logprobs(choice, self._tokenizer, self._body.top_logprobs or 0, first_token=first_token)

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _running_usage(self, output: RequestOutput | None) -> Json:
        if self._body.usage_on_every_chunk and output is not None:
            return {"usage": usage([output])}
        return {"usage": None} if self._body.include_usage else {}


def router(service: Service) -> APIRouter:
    """The route of chats."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        service.check_model(body.model)
        body.check()
        params = body.sampling_params(service.engine.default_sampling_params)
        prompt = await service.engine.encode_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
        )
        request = service.request(prompt.token_ids, params, default_max_tokens=None, salt=body.cache_salt or "")
        answer = ChatCompletion(service, body, http.state.request_id)
        generation = Generation(service.engine, [request])
        try:
            if body.stream:
                outputs = await generation.started(http)
                return EventStream(answer.chunks(outputs), generation)
            [output] = await unless_disconnected(http, generation.finished())
            return json_response(answer.whole(output))
        except BaseException:
            generation.close()
            raise

    return routes
