"""A load generator for servers: as little as it takes to send requests and to time the events of their answers."""

import asyncio
import json
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from fairlead.errors import ConfigError, FairleadError

MAX_ERROR_BYTES = 4096  # of an answer that is none


@dataclass(slots=True, kw_only=True)
class Answer:
    """One request, by time.perf_counter(): when it began, and when each event with text came.

    `status` is that of the response, 0 if none came.
    """

    start: float
    status: int = 0
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a server listens, and what its requests must bring."""

    host: str
    port: int
    is_tls: bool
    headers: dict[str, str]

    @classmethod
    def of(cls, url: str, api_key: str | None) -> "Target":
        """Raises ConfigError if the URL is no HTTP address."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ConfigError(f"--url must begin with http:// or https://, got {url!r:.200}")
        is_tls = parts.scheme == "https"
        headers = {"host": parts.netloc, "content-type": "application/json"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        return cls(host=parts.hostname, port=parts.port or (443 if is_tls else 80), is_tls=is_tls, headers=headers)

    def head(self, method: str, path: str, length: int) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join([*lines, f"content-length: {length}", "connection: close", "", ""]).encode()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Raises FairleadError if nobody listens."""
        context = ssl.create_default_context() if self.is_tls else None
        try:
            return await asyncio.open_connection(self.host, self.port, ssl=context)
        except OSError as error:
            raise FairleadError(
                f"{self.host}:{self.port} cannot be reached: {error}; is the server running?"
            ) from error

    async def get(self, path: str) -> Any:
        """The JSON of a small answer. Raises FairleadError."""
        reader, writer = await self.connect()
        try:
            writer.write(self.head("GET", path, 0))
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            body = await reader.read()
        finally:
            writer.close()
        if status != 200:
            raise FairleadError(f"{path} answered {status}")
        return json.loads(body)


async def ask(target: Target, body: dict[str, Any]) -> Answer:
    """Streams one completion and notes when its events come. A failure is noted, not raised."""
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    answer = Answer(start=time.perf_counter())
    try:
        reader, writer = await target.connect()
        try:
            writer.write(target.head("POST", "/v1/completions", len(content)) + content)
            await _read(reader, answer)
        finally:
            writer.close()
    except (FairleadError, OSError, ValueError, IndexError) as error:
        answer.error = str(error) or type(error).__name__
    answer.end = time.perf_counter()
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    answer.status = int((await reader.readline()).split()[1])
    while (await reader.readline()).strip():
        pass
    if answer.status != 200:
        answer.error = f"status {answer.status}: {_message(await reader.read(MAX_ERROR_BYTES))}"
        return
    last = b""
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            usage = json.loads(last[6:])["usage"]
            answer.num_prompt_tokens, answer.num_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            del answer.times[-1]  # that of the usage
            return
        last = line
        answer.times.append(time.perf_counter())
    answer.error = "the stream ended early"


def _message(body: bytes) -> str:
    """What an error's envelope says, or else its bytes."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode(errors="replace")


async def generate_load(
    target: Target, bodies: Sequence[dict[str, Any]], *, request_rate: float, max_concurrency: int, seed: int
) -> list[Answer]:
    """Sends all requests, `request_rate` per second at Poisson's intervals, and so many at a time at most."""
    places = asyncio.Semaphore(max_concurrency)
    clock = random.Random(seed)

    async def one(body: dict[str, Any], delay: float) -> Answer:
        await asyncio.sleep(delay)
        async with places:
            return await ask(target, body)

    delay, tasks = 0.0, []
    for body in bodies:
        tasks.append(asyncio.ensure_future(one(body, delay)))
        delay += clock.expovariate(request_rate) if request_rate else 0.0
    return list(await asyncio.gather(*tasks))
