"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from collections.abc import Sequence as Seq

from fastapi import APIRouter, Request, Response

from fairlead.request import CompletionOutput, RequestOutput
from fairlead_server.access import tenant_of
from fairlead_server.json_route import JsonRoute
from fairlead_server.protocol import CompletionBody
from fairlead_server.responses import Entries, Json, Sent, completion_logprobs, json_response, prompt_logprobs, usage_of
from fairlead_server.service import Service
from fairlead_server.streaming import EventStream

DEFAULT_MAX_TOKENS = 16


class Completion:
    """One call: its prompts, and how its answers are spelt."""

    def __init__(self, service: Service, body: CompletionBody, prompts: list[str], request_id: str) -> None:
        self._body = body
        self._tokenizer = None if body.return_tokens_as_token_ids else service.engine.front_end.tokenizer
        self._echoes = prompts  # empty texts unless the prompt is to be echoed
        self._head: Json = {
            "id": f"cmpl-{body.request_id or request_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_name(body.model),
        }

    def whole(self, outputs: list[RequestOutput]) -> Json:
        """The answer as one body."""
        choices = []
        for i, output in enumerate(outputs):
            echo = self._echoes[i]
            for choice in output.outputs:
                prompt = self._echoed(output)
                offset = 0 if prompt[0] else len(echo)
                logprobs = completion_logprobs(choice, self._tokenizer, offset=offset, prompt=prompt)
                shown = self._choice(i, choice, echo + choice.text, logprobs)
                if self._body.return_token_ids:
                    shown |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": choice.token_ids}
                if self._body.prompt_logprobs is not None:
                    shown["prompt_logprobs"] = prompt_logprobs(output)
                choices.append(shown)
        return {**self._head, "choices": choices, "usage": usage_of(outputs)}

    async def chunks(self, outputs: AsyncIterator[tuple[int, RequestOutput]]) -> AsyncGenerator[object, None]:
        """The answer piece by piece."""
        sent: dict[tuple[int, int], Sent] = {}
        last: dict[int, RequestOutput] = {}
        async for i, output in outputs:
            last[i] = output
            for choice in output.outputs:
                piece = self._piece(i, output, choice, sent.setdefault((i, choice.index), Sent()))
                if piece is not None:
                    yield {**self._head, "choices": [piece], **self._running_usage(last)}
        if self._body.include_usage:
            yield {**self._head, "choices": [], "usage": usage_of(last.values())}

    def _echoed(self, output: RequestOutput) -> tuple[Seq[int], Entries]:
        """The prompt's tokens and their log-probabilities, where they are to be echoed."""
        if not self._body.echoes_logprobs or output.prompt_logprobs is None:
            return (), ()
        return output.prompt_token_ids, output.prompt_logprobs

    def _piece(self, i: int, output: RequestOutput, choice: CompletionOutput, sent: Sent) -> Json | None:
        if sent.finished:
            return None
        first = not sent.started
        echo = self._echoes[i] if first else ""
        prompt: tuple[Seq[int], Entries] = ((), ()) if sent.started else self._echoed(output)
        sent.started = True
        sent.offset += 0 if prompt[0] else len(echo)
        text, first_token = sent.advance(choice)
        sent.finished = choice.finished
        logprobs = completion_logprobs(
            choice, self._tokenizer, first_token=first_token, offset=sent.offset, prompt=prompt
        )
        if logprobs is not None:
            sent.offset += sum(map(len, logprobs["tokens"]))
        token_ids = choice.token_ids[first_token:] if self._body.return_token_ids else ()
        if not (echo or text or choice.finished or logprobs or token_ids):
            return None
        piece = self._choice(i, choice, echo + text, logprobs)
        if self._body.return_token_ids:
            piece["token_ids"] = token_ids
            if first:
                piece["prompt_token_ids"] = output.prompt_token_ids
        return piece

    def _choice(self, i: int, choice: CompletionOutput, text: str, logprobs: Json | None) -> Json:
        return {
            "index": i * (self._body.n or 1) + choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def _running_usage(self, last: dict[int, RequestOutput]) -> Json:
        if self._body.usage_on_every_chunk:
            return {"usage": usage_of(last.values())}
        return {"usage": None} if self._body.include_usage else {}


def router(service: Service) -> APIRouter:
    """The route of completions."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/completions")
    async def complete(body: CompletionBody, http: Request) -> Response:
        service.model_name(body.model)
        body.check()
        params = body.sampling_params(service.engine.default_sampling_params)
        requests, echoes = [], []
        for prompt in body.prompts():
            special = body.add_special_tokens is not False
            ids = await service.engine.encode(prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
            request = service.request(ids, params, body, tenant=tenant_of(http), default_max_tokens=DEFAULT_MAX_TOKENS)
            requests.append(request)
            is_whole = len(request.prompt_token_ids) == len(ids)
            if not body.echo:
                echoes.append("")
            elif isinstance(prompt, str) and is_whole:
                echoes.append(prompt)
            else:
                echoes.append(service.engine.front_end.decode(request.prompt_token_ids))
        completion = Completion(service, body, echoes, http.state.request_id)
        generation = service.start(requests, http)
        try:
            if body.stream:
                outputs = await generation.started()
                return EventStream(completion.chunks(outputs), generation)
            return json_response(completion.whole(await generation.finished()))
        except BaseException:
            generation.close()
            raise

    return routes
