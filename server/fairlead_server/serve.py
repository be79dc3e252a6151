"""`fairlead serve`: takes the port, starts the engine, serves until a signal, and leaves nothing behind."""

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import uvicorn
from fastapi import FastAPI

from fairlead.config import EngineConfig, ServerConfig
from fairlead.engine.async_engine import AsyncEngine
from fairlead.errors import ConfigError, FairleadError
from fairlead_server.access import read_keys
from fairlead_server.app import check_tracing, create_app
from fairlead_server.banner import banner
from fairlead_server.http_protocol import HttpProtocol
from fairlead_server.logs import set_up_logging
from fairlead_server.service import Service

SEND_BUFFER_BYTES = 64 * 2**10  # of a connection: what a client does not read waits here, or else in its generation
GRACE_S = 5  # how long connections whose requests have ended may take to close
LAST_WORDS_S = 0.1  # how long clients may take to hear that their requests were cut off
ENGINE_STOP_S = 0.1  # how long an engine whose requests were cut off may take to end by itself
DEATH_NOTICE_S = 3.0  # how long a server without an engine still says so, before it exits
EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
SIGNALS = (signal.SIGINT, signal.SIGTERM)

logger = logging.getLogger("fairlead.server")


class PortTakenError(FairleadError):
    """The address to listen on cannot be had."""


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit status. Raises FairleadError if it cannot start."""
    set_up_logging(server_config)
    read_keys(server_config)  # wrong files are told before the model is loaded
    check_certificate(server_config)
    check_tracing(server_config)
    uds = server_config.uds
    listener = bind(server_config.host, server_config.port) if uds is None else bind_uds(uds)
    try:
        return asyncio.run(_Service(engine_config, server_config, listener).run())
    finally:
        listener.close()
        if uds is not None:
            Path(uds).unlink(missing_ok=True)


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before anything slow begins. Raises PortTakenError."""
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise _cannot_listen(host, port, error) from error
    return listener


def check_certificate(config: ServerConfig) -> None:
    """Raises ConfigError if the certificate, its key or its authorities cannot be used."""
    if config.ssl_certfile is None:
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, lambda: config.ssl_keyfile_password or "")
        if config.ssl_ca_certs is not None:
            context.load_verify_locations(config.ssl_ca_certs)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"ssl_certfile {config.ssl_certfile} cannot be used: {error}") from error


def bind_uds(path: str) -> socket.socket:
    """A Unix socket that only this user may use, in place of what a dead server left there. Raises PortTakenError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError):
            try:
                probe.connect(path)
            except ConnectionRefusedError:  # so says a plain file, too, which is not ours to replace
                if Path(path).is_socket():
                    Path(path).unlink()
        listener.bind(path)
        Path(path).chmod(0o600)
    except OSError as error:
        listener.close()
        raise PortTakenError(f"cannot listen on --uds {path}: {error.strerror or error}; choose another") from error
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
        self._hurried = asyncio.Event()
        self._died = False

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
        if self._signalled.is_set():
            self._hurried.set()
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
        app = create_app(engine, self._server_config)
        gc.collect()
        gc.freeze()  # or a collection would walk every module, and all clients would wait: 63 ms for 98,000 objects
        http = _HttpServer(uvicorn_config(app, self._server_config))
        serving = asyncio.ensure_future(http.serve(sockets=[self._listener]))
        while not http.started and not serving.done():
            await asyncio.sleep(0.01)
        if http.started:
            text = banner(engine.info, self._engine_config.platform, self._server_config, self._listener.getsockname())
            print(text, file=sys.stderr, flush=True)
        try:
            if http.started:
                await self._stop(engine, app.state.service, http)
            await serving
        except OSError as error:  # somebody took the port while the engine was loading
            raise _cannot_listen(self._server_config.host, self._server_config.port, error) from error
        return EXIT_FAILED if self._died else EXIT_OK

    async def _stop(self, engine: AsyncEngine, service: Service, http: "_HttpServer") -> None:
        """Waits for a signal or for the engine's death, and ends the server as befits."""
        died = asyncio.ensure_future(engine.dead.wait())
        signalled = asyncio.ensure_future(self._signalled.wait())
        await asyncio.wait([died, signalled], return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            self._died = True
            print(f"error: {engine.cause}; the server stops", file=sys.stderr, flush=True)
            await asyncio.sleep(DEATH_NOTICE_S)
        else:
            service.is_draining = True
            logger.info("stopping: %d requests are in flight", service.num_active)
            await self._drained(service, died)
            self._died = died.done()
            died.cancel()
            if service.num_active:
                logger.warning("%d requests did not end in time and are cut off", service.num_active)
                await engine.shutdown(ENGINE_STOP_S)
                await asyncio.sleep(LAST_WORDS_S)
                http.force_exit = True
        http.should_exit = True

    async def _drained(self, service: Service, died: "asyncio.Future[Literal[True]]") -> None:
        """Returns when no request is in flight, when time is up, on a second signal, or when the engine dies."""
        end = time.monotonic() + self._server_config.shutdown_timeout
        while service.num_active and time.monotonic() < end and not (self._hurried.is_set() or died.done()):
            await asyncio.sleep(0.02)


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """How the application is put on a socket."""
    return uvicorn.Config(
        app,
        http=HttpProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=config.access_log and config.log_level in ("debug", "info"),
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        ssl_keyfile_password=config.ssl_keyfile_password,
        ssl_ca_certs=config.ssl_ca_certs,
        ssl_cert_reqs=config.ssl_cert_reqs,
    )
