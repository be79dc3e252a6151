"""Pure ASGI middleware: nothing here holds back a stream."""

import asyncio
import re
import uuid

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fairlead_server.errors import as_api_error, envelope, unavailable
from fairlead_server.service import Service

MAX_BODY_BYTES = 32 * 2**20
BODY_STALL_S = 30.0  # how long a client may pause while it sends its body
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

PROBES = frozenset(
    {b"/health", b"/health/live", b"/health/ready", b"/health/startup", b"/ping", b"/version", b"/metrics", b"/load"}
)


class RequestIds:
    """Echoes X-Request-Id, or makes one; `request.state.request_id` holds it. It never identifies work inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode("ascii")

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        await self._app(scope, receive, send_with_id)


class Failures:
    """Answers what nobody expected with a bare 500, if the answer has not begun; the log has the traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def send_noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except Exception as error:
            if started or scope["type"] != "http":
                raise
            await envelope(as_api_error(error))(scope, receive, send)


class Admission:
    """Counts the requests in flight, but for probes, and refuses further ones while the server drains."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        if scope["type"] != "http" or raw_path(scope) in PROBES:
            await self._app(scope, receive, send)
            return
        if service.is_draining:
            service.num_refused["draining"] += 1
            await envelope(unavailable("The server is about to stop and takes no new requests."))(scope, receive, send)
            return
        service.num_active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            service.num_active -= 1


class BodyLimit:
    """Refuses a body over MAX_BODY_BYTES before anything parses it, whether or not it announces its length.

    A body that stops coming for BODY_STALL_S is given up, too.
    """

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        num_bytes = int(announced) if announced.isdigit() and len(announced) < 20 else 0
        complete = False

        async def receive_some() -> Message:
            nonlocal num_bytes, complete
            if complete:
                return await receive()
            if num_bytes > self._max_bytes:
                raise too_large
            try:
                async with asyncio.timeout(BODY_STALL_S):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408, f"The body stopped coming for {BODY_STALL_S:g} s.") from error
            num_bytes += 0 if announced != b"0" else len(message.get("body", b""))
            complete = not message.get("more_body", False)
            return message

        too_large = HTTPException(413, f"The body is larger than {self._max_bytes // 2**20} MiB.")
        await self._app(scope, receive_some, send)


def raw_path(scope: Scope) -> bytes:
    """The path as the client wrote it, without the query; no other spelling of it is the same path here."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return path
