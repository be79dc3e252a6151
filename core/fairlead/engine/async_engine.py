"""The engine for servers: it runs in a process of its own, and this side of it is asyncio and imports no torch.

Tokenisation and detokenisation happen here, so that the engine's loop only ever sees integers.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from fairlead import errors
from fairlead.config import EngineConfig
from fairlead.engine.connection import STOP_S, EngineConnection, in_thread
from fairlead.engine.front_end import FrontEnd
from fairlead.engine.messages import (
    Abort,
    Add,
    Failed,
    FromEngine,
    Heartbeat,
    ProtocolError,
    Ready,
    Rejected,
    Step,
    Stop,
)
from fairlead.engine.output_processor import OutputProcessor
from fairlead.engine.timeline import EngineObserver as EngineObserver
from fairlead.engine.timeline import Timeline as Timeline
from fairlead.errors import ContextLengthError, DeadlineError, EngineDeadError, FairleadError, RequestError
from fairlead.request import EngineInfo, EngineStats, FinishReason, Request, RequestOutput, SamplingParams
from fairlead.tokenization.chat_template import ChatOptions, ChatPrompt

LONG_TEXT_CHARS = 4096  # longer prompts are tokenised in a thread
HANG_S = 9.0  # silence after which the engine counts as hung; idle it speaks every second, busy after every step
# What one turn of the event loop may hold, so that a probe, which needs five of them, never waits for long: the time in
# which messages of the engine are taken in, and the streams that are woken (0.1 to 0.2 ms of work each).
SLICE_S = 0.002
WAKES = 16
_LAST_WORDS_S = 0.2

logger = logging.getLogger("fairlead.engine")


class RequestStream:
    """One request's outputs as an async iterator: cumulative, and always the newest, so a slow reader skips some.

    Close it (or leave `AsyncEngine.generate`'s loop) to abort a request that has not finished.
    """

    def __init__(self, engine: "AsyncEngine", request: Request) -> None:
        self.request = request
        self.times = Timeline(arrived=time.monotonic())
        self._engine = engine
        self._timers: list[asyncio.TimerHandle] = []
        self._latest: RequestOutput | None = None
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._is_queued = False  # to be woken
        self._ended = False

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._news.wait()
        self._news.clear()
        if self._error is not None:
            self._ended = True
            raise self._error
        assert self._latest is not None
        self._ended = self._latest.finished
        return self._latest

    def close(self) -> None:
        """Aborts the request if it has not finished; its blocks are free after the engine's current step."""
        self._ended = True
        self._engine._leave(self.request)

    def fail(self, error: Exception) -> None:
        """Aborts the request, too, and has whoever reads the stream, or reads on, meet the error."""
        self._engine._leave(self.request)
        self._fail(error)

    def _put(self, output: RequestOutput) -> None:
        self._latest = output
        if not self._is_queued:
            self._is_queued = True
            self._engine._wake_later(self)

    def _wake(self) -> None:
        self._is_queued = False
        self._news.set()

    def _fail(self, error: Exception) -> None:
        self._error = error
        self._news.set()

    def _set_timers(self, max_queue_s: float | None, max_total_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        if max_queue_s is not None:
            self._timers.append(loop.call_later(max_queue_s, self._queue_timeout, max_queue_s))
        if max_total_s is not None:
            message = f"the request was not finished within {max_total_s:g} s"
            self._timers.append(loop.call_later(max_total_s, self.fail, DeadlineError(message, queued=False)))

    def _queue_timeout(self, seconds: float) -> None:
        if self.times.started is None:
            message = f"the request waited {seconds:g} s without being taken up; try again later"
            self.fail(DeadlineError(message, queued=True))

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()


class AsyncEngine:
    """Runs many requests at once on an engine in another process; lives in one event loop.

        engine = await AsyncEngine.start(EngineConfig.of(model="demo"))
        async for output in engine.generate("ROMEO:", SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)
        await engine.shutdown()

    `stats` is the engine's last word on itself, `num_ended` counts ended sequences by finish reason, `observer` hears
    of steps and requests if there is one, and `dead` is set once the engine has ended (`cause` says why). No request
    survives that; no new one is taken.
    """

    def __init__(self, connection: EngineConnection, config: EngineConfig, info: EngineInfo, front: FrontEnd) -> None:
        self.config = config
        self.info = info
        self.front_end = front
        self.stats = EngineStats()
        self.observer: EngineObserver | None = None
        self.num_ended: Counter[FinishReason] = Counter(dict.fromkeys(FinishReason, 0))
        self.dead = asyncio.Event()
        self.cause: str | None = None
        self._connection = connection
        self._outputs = OutputProcessor(front.tokenizer)
        self._streams: dict[str, RequestStream] = {}
        self._waiting: set[str] = set()
        self._to_wake: deque[RequestStream] = deque()
        self._last_message_at = time.monotonic()
        self._tasks = [asyncio.ensure_future(self._read()), asyncio.ensure_future(self._watch())]

    @classmethod
    async def start(cls, config: EngineConfig) -> "AsyncEngine":
        """Spawns the engine's process and returns once the model is loaded.

        Raises what the loading raised, as its class of fairlead.errors; no process is left behind then, nor when the
        awaiting task is cancelled.
        """
        connection = EngineConnection(config)
        front = in_thread(lambda: FrontEnd.open(config))
        info = asyncio.ensure_future(_ready(connection))
        try:
            parts: list[asyncio.Future[Any]] = [front, info]
            await asyncio.wait(parts, return_when=asyncio.FIRST_EXCEPTION)
            for part in parts:
                if part.done():
                    part.result()
            return cls(connection, config, info.result(), front.result())
        except BaseException:
            info.cancel()
            connection.kill()
            raise

    @property
    def is_healthy(self) -> bool:
        """Whether the engine's process lives and has spoken within HANG_S."""
        return not self.dead.is_set() and time.monotonic() - self._last_message_at < HANG_S

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, over SamplingParams' own defaults."""
        return self.front_end.default_sampling_params

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt. Raises RequestError."""
        if len(text) <= LONG_TEXT_CHARS:
            return self.front_end.encode(text, add_special_tokens=add_special_tokens)
        return await in_thread(lambda: self.front_end.encode(text, add_special_tokens=add_special_tokens))

    async def encode_chat(self, messages: list[dict[str, Any]], options: ChatOptions | None = None) -> ChatPrompt:
        """A chat as text and token ids, through the model's template. Raises RequestError."""
        return await in_thread(lambda: self.front_end.encode_chat(messages, options))

    def request(
        self, prompt_token_ids: Sequence[int], params: SamplingParams, *, cache_salt: str = "", priority: int = 0
    ) -> Request:
        """Makes a request that the engine can run, under an id of its own. Raises RequestError if it cannot."""
        if priority and self.config.scheduler.scheduling_policy == "fcfs":
            message = "the server serves requests in order of arrival; --scheduling-policy priority changes that"
            raise RequestError(message, param="priority")
        if params.callables:
            message = "the engine runs in another process: logits_processors must be names of entry points"
            raise RequestError(message, param="logits_processors")
        request_id = uuid.uuid4().hex
        return self.front_end.request(
            request_id, prompt_token_ids, params, self.info, cache_salt=cache_salt, priority=priority
        )

    @property
    def num_waiting(self) -> int:
        """Requests that were submitted and that no step has taken up yet."""
        return len(self._waiting)

    def submit(
        self,
        request: Request,
        prompt: str | None = None,
        *,
        max_queue_s: float | None = None,
        max_total_s: float | None = None,
    ) -> RequestStream:
        """Starts a request of `request()`; close the stream when done with it. Raises EngineDeadError.

        The stream raises DeadlineError, and the request's blocks are freed, if no step takes the request up within
        `max_queue_s` or if it is not finished within `max_total_s`.
        """
        if self.cause is not None:
            raise EngineDeadError(self.cause)
        self._outputs.add(request, prompt)
        stream = self._streams[request.request_id] = RequestStream(self, request)
        try:
            self._connection.send(Add(request))
        except EngineDeadError:
            self._outputs.abort(request.request_id)
            del self._streams[request.request_id]
            raise
        self._waiting.add(request.request_id)
        stream._set_timers(max_queue_s, max_total_s)
        return stream

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Yields cumulative outputs, which bear `request_id` if one is given. Leaving the loop aborts the request.

        Raises RequestError at the first step if the request cannot run, EngineDeadError if the engine ends meanwhile.
        """
        text = prompt if isinstance(prompt, str) else None
        token_ids = await self.encode(prompt) if isinstance(prompt, str) else prompt
        stream = self.submit(self.request(token_ids, params or self.default_sampling_params), text)
        try:
            async for output in stream:
                yield output if request_id is None else replace(output, request_id=request_id)
        finally:
            stream.close()

    async def shutdown(self, wait_s: float = STOP_S) -> None:
        """Fails what still runs, stops the engine's process and waits for it to end; kills it after `wait_s`."""
        with contextlib.suppress(EngineDeadError):
            self._connection.send(Stop())
        self._die("the engine was shut down")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connection.close(wait_s)

    async def _read(self) -> None:
        slice_end = 0.0
        try:
            while self.cause is None:
                message = await self._connection.receive()  # does not suspend while there are messages
                self._last_message_at = time.monotonic()
                self._handle(message)
                if self._last_message_at >= slice_end:
                    await asyncio.sleep(0)  # others take their turn
                    slice_end = time.monotonic() + SLICE_S
        except Exception as error:  # a fault on this side, or bytes that are no message: nobody may wait for ever
            logger.exception("the front end of the engine failed")
            self._die(f"the front end of the engine failed: {type(error).__name__}: {error}")

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Step():
                self._take_stats(message.stats)
                self._deliver(message)
            case Heartbeat():
                self._take_stats(message.stats)
            case Rejected():
                self._reject(message)
            case Failed():
                logger.error("the engine failed: %s: %s\n%s", message.error, message.message, message.details)
                self._die(f"the engine failed: {message.error}: {message.message}")
            case Ready():
                raise ProtocolError("the engine's process said Ready twice")

    async def _watch(self) -> None:
        status = await asyncio.shield(self._connection.exited)  # close() still needs it when this task is cancelled
        await asyncio.sleep(_LAST_WORDS_S)  # it may have said why
        self._die(_how_it_ended(status))

    def _take_stats(self, stats: EngineStats) -> None:
        num_steps = stats.num_steps - self.stats.num_steps
        if self.observer is not None and num_steps:
            num_tokens = stats.num_scheduled_tokens - self.stats.num_scheduled_tokens
            for _ in range(num_steps):  # one, or those that were prepared ahead
                self.observer.step(num_tokens / num_steps)
        self.stats = stats

    def _deliver(self, step: Step) -> None:
        now = self._last_message_at
        for request_id in step.started:
            self._waiting.discard(request_id)
            if (stream := self._streams.get(request_id)) is not None:
                stream.times.started = now
        processed = self._outputs.process(step.deltas)
        for request_id, index in processed.finish:
            self._send(Abort(request_id, index))
        for output in processed.outputs:
            stream = self._streams[output.request_id]
            self._note_tokens(stream.times, now)
            stream._put(output)
            if output.finished:
                self._ended(output)

    def _wake_later(self, stream: RequestStream) -> None:
        """Queues a stream whose reader is to see its newest output; what comes until its turn joins it."""
        if not self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_some)
        self._to_wake.append(stream)

    def _wake_some(self) -> None:
        for _ in range(min(WAKES, len(self._to_wake))):
            self._to_wake.popleft()._wake()
        if self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_some)

    def _note_tokens(self, times: Timeline, now: float) -> None:
        if times.last_token is None:
            times.first_token = now
        elif self.observer is not None:
            self.observer.gap(now - times.last_token)
        times.last_token = now

    def _ended(self, output: RequestOutput) -> RequestStream:
        """Forgets a request and counts its sequences."""
        stream = self._streams.pop(output.request_id)
        self._waiting.discard(output.request_id)
        stream._stop_timers()
        for sequence in output.outputs:
            assert sequence.finish_reason is not None
            self.num_ended[FinishReason(sequence.finish_reason)] += 1
        if self.observer is not None:
            self.observer.ended(stream.request, output, stream.times, time.monotonic())
        return stream

    def _reject(self, message: Rejected) -> None:
        self._outputs.abort(message.request_id)
        self._waiting.discard(message.request_id)
        stream = self._streams.pop(message.request_id, None)
        if stream is not None:
            stream._stop_timers()
            kind = ContextLengthError if message.error == ContextLengthError.__name__ else RequestError
            stream._fail(kind(message.message, param=message.param))

    def _leave(self, request: Request) -> None:
        """The reader of a request is gone."""
        output = self._outputs.abort(request.request_id)
        if output is not None:
            self._ended(output)
            self._send(Abort(request.request_id))

    def _send(self, message: Abort) -> None:
        with contextlib.suppress(EngineDeadError):  # _watch tells everybody
            self._connection.send(message)

    def _die(self, cause: str) -> None:
        """Ends every request with EngineDeadError; the first cause stays."""
        if self.cause is not None:
            return
        self.cause = cause
        self.stats = replace(self.stats, num_requests_running=0, num_requests_waiting=0, kv_cache_usage=0.0)
        for output in self._outputs.fail_all(cause):
            self._ended(output)._fail(EngineDeadError(cause))
        self.dead.set()


async def _ready(connection: EngineConnection) -> EngineInfo:
    """Waits for the engine to load. Raises what it raised, or EngineDeadError if it just ended."""
    first = asyncio.ensure_future(connection.receive())
    either: list[asyncio.Future[Any]] = [first, connection.exited]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not first.done():
        await asyncio.wait([first], timeout=_LAST_WORDS_S)
    if not first.done():
        first.cancel()
        raise EngineDeadError(f"{_how_it_ended(connection.exited.result())} while it loaded the model")
    message = first.result()
    if isinstance(message, Ready):
        return message.info
    if isinstance(message, Failed):
        raise _as_raised(message)
    raise EngineDeadError(f"the engine's process began with {type(message).__name__}, not with Ready")


def _as_raised(message: Failed) -> FairleadError:
    """The error that the loading raised: as its own class where it is one of ours."""
    kind = getattr(errors, message.error, None)
    if isinstance(kind, type) and issubclass(kind, FairleadError):
        error: FairleadError = kind.__new__(kind)
        error.args = (message.message,)
    else:
        error = EngineDeadError(f"the engine could not start: {message.error}: {' '.join(message.message.split())}")
    error.add_note(message.details)
    return error


def _how_it_ended(status: int) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit status {status}"
    return f"the engine's process {how}"
