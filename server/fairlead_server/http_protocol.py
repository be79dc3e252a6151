"""HTTP/1.1 on a connection: uvicorn's protocol with bounds on what a client may send before its request begins."""

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from fairlead_server.errors import ApiError
from fairlead_server.responses import encode_json

MAX_HEAD_BYTES = 32 * 2**10
HEAD_S = 30.0  # how long a client may take to send a request's head


class HttpProtocol(HttpToolsProtocol):
    """Refuses heads that are too large or too slow, and says so in the envelope, as of whatever is no HTTP.

    `scope["state"]["abort_connection"]` drops the connection with what is still to be sent.
    """

    _in_head = False
    _num_head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _refusal: ApiError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = True
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes = self._num_head_bytes + len(data) if self._in_head else 0
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(_too_large())
            else:
                self._start_timer()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["abort_connection"] = self.transport.abort
        self._in_head = True

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEAD_BYTES:
            self._refusal = _too_large()
            raise ValueError("the head is too large")  # the parser stops, and send_400_response is called
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal or ApiError(400, "This is no valid HTTP request."))

    def _refuse(self, error: ApiError) -> None:
        body = encode_json(error.body)
        head = [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close", b"", body]
        self.transport.write(STATUS_LINE[error.status] + b"\r\n".join(head))
        self.transport.close()

    def _start_timer(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self._time_out)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _time_out(self) -> None:
        if not self.transport.is_closing():
            self._refuse(ApiError(408, f"The head of the request was not complete within {HEAD_S:g} s."))


def _too_large() -> ApiError:
    return ApiError(431, f"The head of the request is larger than {MAX_HEAD_BYTES // 2**10} KiB.")
