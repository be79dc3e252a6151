"""What every route stands on: the engine, the names it serves, and a group of requests that lives and ends as one."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from fastapi import Request as HttpRequest

from fairlead.config import ServerConfig
from fairlead.engine.async_engine import AsyncEngine, RequestStream
from fairlead.errors import ContextLengthError, DeadlineError
from fairlead.request import Request, RequestOutput, SamplingParams
from fairlead_server.errors import ApiError, ClientDisconnectedError, model_not_found, overloaded
from fairlead_server.protocol import GenerationBody

REFUSALS = ("queue_full", "queue_timeout", "draining")  # why a request is not run


@dataclass(slots=True, kw_only=True)
class Service:
    """The engine, the names that it serves, and how much of it is in use.

    `num_active` counts the HTTP requests in flight that are no probes; once `is_draining` no further one is taken.
    """

    engine: AsyncEngine
    config: ServerConfig
    created: int = field(default_factory=lambda: int(time.time()))
    num_active: int = 0
    is_draining: bool = False
    caller: Callable[[], object] = lambda: None  # the trace of the HTTP request that runs
    num_refused: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REFUSALS, 0)))

    @property
    def model_names(self) -> tuple[str, ...]:
        return self.config.served_model_name or (self.engine.info.model,)

    def model_name(self, asked: str | None) -> str:
        """The name that an answer bears. Raises the 404 of a model that is not served; none asked is the first."""
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            raise model_not_found(asked)
        return asked

    def check_room(self, num_requests: int = 1) -> None:
        """Raises the 429 of a full queue. An empty one takes any one HTTP request, however many prompts it has."""
        num_waiting, limit = self.engine.num_waiting, self.config.max_queued_requests
        if num_waiting and num_waiting + num_requests > limit:
            self.num_refused["queue_full"] += 1
            raise overloaded(f"The queue is full: {num_waiting} requests wait, at most {limit} may. Try again later.")

    def start(self, requests: list[Request], http: HttpRequest) -> "Generation":
        """Hands the requests to the engine, under the deadlines that are set. Raises ApiError if the queue is full."""
        self.check_room(len(requests))
        return Generation(self, requests, http)

    def request(
        self,
        prompt: list[int],
        params: SamplingParams,
        body: GenerationBody,
        *,
        tenant: str,
        default_max_tokens: int | None,
    ) -> Request:
        """Makes the engine's request. Where params.max_tokens is None, the model's own default holds, or else
        `default_max_tokens`, or else the rest of the context; each as far as it fits.

        Tenants share no cached prefix, or one could tell from the times what another has asked.

        Raises RequestError if the model can never run it: prompt and asked max_tokens must fit the context together.
        """
        limit = self.engine.info.max_model_len
        salt = f"{tenant}\0{body.cache_salt or ''}" if tenant else body.cache_salt or ""
        request = self.engine.request(prompt, params, cache_salt=salt, priority=body.priority or 0)
        num_prompt = len(request.prompt_token_ids)
        room = limit - num_prompt
        if params.max_tokens is None:
            default = self.engine.front_end.default_max_tokens or default_max_tokens or room
            max_tokens = min(default, room)
            return replace(request, params=replace(params, max_tokens=max_tokens))
        if params.max_tokens > room:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{num_prompt + params.max_tokens} tokens ({num_prompt} in the prompt, {params.max_tokens} in the "
                "completion). Please reduce the prompt or the completion.",
                param=body.max_tokens_name,
            )
        return request


class Generation:
    """The engine's requests behind one HTTP request, one per prompt. Close it to abort what has not finished.

    When the client leaves, all of them end, and whoever reads outputs meets ClientDisconnectedError.
    """

    def __init__(self, service: Service, requests: list[Request], http: HttpRequest) -> None:
        self._service = service
        self._streams: list[RequestStream] = []
        self._watcher = asyncio.ensure_future(_watch(http, self._streams))
        config = service.config
        try:
            for request in requests:
                stream = service.engine.submit(
                    request, max_queue_s=config.max_queue_time, max_total_s=config.max_request_time
                )
                stream.times.caller = service.caller()
                self._streams.append(stream)
        except BaseException:
            self.close()
            raise

    async def started(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """`outputs`, once there is a first one: an error before it still becomes a status of its own."""
        outputs = self.outputs()
        first = await anext(outputs)

        async def all_of_them() -> AsyncIterator[tuple[int, RequestOutput]]:
            yield first
            async for item in outputs:
                yield item

        return all_of_them()

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Cumulative outputs with the index of their prompt. Raises ApiError if a sequence fails."""
        try:
            if len(self._streams) == 1:
                async for output in self._streams[0]:
                    yield 0, _unless_failed(output)
            else:
                async for i, output in _merged(self._streams):
                    yield i, _unless_failed(output)
        except DeadlineError as error:
            if error.queued:
                self._service.num_refused["queue_timeout"] += 1
            raise

    async def finished(self) -> list[RequestOutput]:
        """The final output of every prompt."""
        final: dict[int, RequestOutput] = {}
        async for i, output in self.outputs():
            final[i] = output
        return [final[i] for i in range(len(self._streams))]

    def close(self) -> None:
        """Aborts what has not finished."""
        self._watcher.cancel()
        for stream in self._streams:
            stream.close()


async def _watch(http: HttpRequest, streams: list[RequestStream]) -> None:
    """Fails the streams when the client leaves: the body has been read, so that nothing else is left to be heard.

    It knows no `Generation`, which holds its task, and a cancelled task holds the frames that it was in.
    """
    while (await http.receive())["type"] != "http.disconnect":
        pass
    for stream in streams:
        stream.fail(ClientDisconnectedError())


async def _merged(streams: list[RequestStream]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The outputs of all streams as they come, with the stream's index."""
    tasks = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in tasks if task.done()]:
                i = tasks.pop(task)
                output = task.result()
                if not output.finished:
                    tasks[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _unless_failed(output: RequestOutput) -> RequestOutput:
    if output.error is not None:
        raise ApiError(500, f"The engine failed on this request: {output.error}", type="server_error")
    return output
