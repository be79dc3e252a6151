"""`fairlead serve`: takes the port, starts the engine, serves until a signal, and leaves nothing behind."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn

from fairlead.config import EngineConfig, ServerConfig
from fairlead.engine.async_engine import AsyncEngine
from fairlead.errors import FairleadError
from fairlead_server.app import create_app
from fairlead_server.banner import banner

DRAIN_S = 30  # how long requests in flight may take to end after a signal
DEATH_NOTICE_S = 3.0  # how long a server without an engine still says so, before it exits
EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger("fairlead.server")


class PortTakenError(FairleadError):
    """The address to listen on cannot be had."""


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit status. Raises FairleadError if it cannot start."""
    logging.basicConfig(
        stream=sys.stderr, level=server_config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
    )
    if server_config.log_level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # the banner says the rest
        logging.getLogger("uvicorn.access").addFilter(_is_no_probe)
    listener = bind(server_config.host, server_config.port)
    try:
        return asyncio.run(_Service(engine_config, server_config, listener).run())
    finally:
        listener.close()


def _is_no_probe(record: logging.LogRecord) -> bool:
    """Whether an access is worth a line; probes come every few seconds."""
    return not any(f" {path} HTTP" in record.getMessage() for path in ("/health", "/ping", "/metrics"))


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything slow begins. Raises PortTakenError."""
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> PortTakenError:
    why = error.strerror or error
    return PortTakenError(f"cannot listen on {host} port {port}: {why}; choose another with --host and --port")


class _HttpServer(uvicorn.Server):
    """uvicorn, with the signals left to us: it would raise them again once it has stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Service:
    """One run: engine and HTTP server, from the first signal handler to the exit status."""

    def __init__(self, engine_config: EngineConfig, server_config: ServerConfig, listener: socket.socket) -> None:
        self._engine_config, self._server_config, self._listener = engine_config, server_config, listener
        self._signalled = asyncio.Event()
        self._http: _HttpServer | None = None

    async def run(self) -> int:
        """Returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)
        engine = await self._start_engine()
        if engine is None:
            return EXIT_INTERRUPTED
        try:
            return EXIT_INTERRUPTED if self._signalled.is_set() else await self._serve(engine)
        finally:
            await engine.shutdown()

    def _on_signal(self) -> None:
        """The first signal drains; a second one does not wait."""
        if self._http is not None:
            self._http.force_exit = self._http.should_exit
            self._http.should_exit = True
        self._signalled.set()

    async def _start_engine(self) -> AsyncEngine | None:
        """None if a signal came first; no process is left then."""
        start = asyncio.ensure_future(AsyncEngine.start(self._engine_config))
        signalled = asyncio.ensure_future(self._signalled.wait())
        await asyncio.wait([start, signalled], return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if start.done():
            return start.result()
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        return None

    async def _serve(self, engine: AsyncEngine) -> int:
        config = uvicorn.Config(
            create_app(engine),
            log_config=None,
            access_log=self._server_config.log_level in ("debug", "info"),
            timeout_graceful_shutdown=DRAIN_S,
            server_header=False,
        )
        self._http = http = _HttpServer(config)
        serving = asyncio.ensure_future(http.serve(sockets=[self._listener]))
        mourning = asyncio.ensure_future(self._exit_after(engine, http))
        while not http.started and not serving.done():
            await asyncio.sleep(0.01)
        if http.started:
            host, port = self._listener.getsockname()[:2]
            print(banner(engine.info, self._engine_config.platform, host, port), file=sys.stderr, flush=True)
        try:
            await serving
        except OSError as error:  # somebody took the port while the engine was loading
            raise _cannot_listen(self._server_config.host, self._server_config.port, error) from error
        finally:
            mourning.cancel()
        return EXIT_FAILED if engine.dead.is_set() else EXIT_OK

    async def _exit_after(self, engine: AsyncEngine, http: _HttpServer) -> None:
        await engine.dead.wait()
        print(f"error: {engine.cause}; the server stops", file=sys.stderr, flush=True)
        await asyncio.sleep(DEATH_NOTICE_S)
        http.should_exit = True
