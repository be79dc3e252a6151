"""Server-sent events: one `data:` line per chunk, `[DONE]` at the end, and an abort when the client leaves."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from fairlead_server.errors import ClientDisconnectedError, as_api_error
from fairlead_server.responses import encode_json
from fairlead_server.service import Generation

STALL_S = 60.0  # how long a client may take nothing of what stands ready for it
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"

logger = logging.getLogger("fairlead.server")


def event(chunk: object) -> bytes:
    """One chunk on the wire."""
    return b"data: " + encode_json(chunk) + b"\n\n"


class EventStream(Response):
    """Sends chunks until they end or the client leaves; then closes the generation.

    An error in the middle becomes one event with the usual envelope, and the stream ends without [DONE].
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[object, None], generation: Generation) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._chunks, self._generation = chunks, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        abort = scope.get("state", {}).get("abort_connection")
        try:
            with contextlib.suppress(OSError):  # the client left while we sent, as servers other than uvicorn say it
                await self._send(send, abort)
        finally:
            self._generation.close()

    async def _send(self, send: Send, abort: Callable[[], None] | None) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with contextlib.aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    async with asyncio.timeout(STALL_S):
                        await send({"type": "http.response.body", "body": event(chunk), "more_body": True})
            last = DONE
        except TimeoutError:  # it takes nothing more, so it can be told nothing either
            logger.warning("a client took nothing of its stream for %g s; its request is aborted", STALL_S)
            if abort is not None:
                abort()
            return
        except ClientDisconnectedError:
            return
        except Exception as error:
            last = event(as_api_error(error).body)
        await send({"type": "http.response.body", "body": last})
