"""The front end's hold on the engine's process: spawns it, talks to it over two local sockets, and ends it."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import zmq
import zmq.asyncio

from fairlead import plugins
from fairlead.config import EngineConfig
from fairlead.engine.messages import FromEngine, Startup, ToEngine, decode_from_engine, encode
from fairlead.engine.process import LENGTH_BYTES
from fairlead.errors import ConfigError, EngineDeadError

COMMAND = (sys.executable, "-P", "-m", "fairlead.engine.process")  # -P: files where the user stands shadow nothing
STOP_S = 5.0
_MAX_PATH_BYTES = 100  # of a Unix socket's address: 107 on Linux, 103 on macOS

T = TypeVar("T")


class EngineConnection:
    """One engine process with its sockets, which stand in a directory that only this user can enter.

    Made and used in one event loop. `exited` is done, with the exit status, once the process has ended.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._dir = Path(tempfile.mkdtemp(prefix="fairlead-"))  # mode 0700
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.PUSH)
        self._events = zmq.asyncio.Socket(self._context, zmq.PULL)
        try:
            platform = plugins.expected(config.platform)
            startup = Startup(
                config,
                self._bind(self._requests, "requests.sock"),
                self._bind(self._events, "events.sock"),
                niceness=platform.niceness if platform is not None else 0,
            )
            self._process = self._spawn(encode(startup), platform.environment if platform is not None else {})
        except BaseException:
            self._close_sockets()
            raise
        self.exited: asyncio.Future[int] = in_thread(self._process.wait)

    def _bind(self, socket: "zmq.Socket[bytes] | zmq.asyncio.Socket", name: str) -> str:
        path = self._dir / name
        if len(bytes(path)) > _MAX_PATH_BYTES:
            raise ConfigError(f"the path of a socket, {path}, is too long; set TMPDIR to a shorter directory")
        socket.set_hwm(0)
        socket.bind(f"ipc://{path}")
        path.chmod(0o600)
        return str(path)

    def _spawn(self, startup: bytes, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            COMMAND,
            env={**environment, **os.environ},
            stdin=subprocess.PIPE,
            stdout=sys.__stderr__,  # results alone go to standard output
            start_new_session=True,  # a terminal's Ctrl-C reaches the parent alone
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died already: `exited` tells
            process.stdin.write(len(startup).to_bytes(LENGTH_BYTES, "little") + startup)
            process.stdin.flush()
        return process

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queues the message; never waits. Raises EngineDeadError if nobody is there to take it."""
        try:
            self._requests.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDeadError("the engine has ended; restart the server") from error

    async def receive(self) -> FromEngine:
        """The next message. Raises ProtocolError on bytes that are none."""
        return decode_from_engine(await self._events.recv())

    async def close(self, wait_s: float = STOP_S) -> None:
        """Waits a while for the process to end (send Stop first), kills it if it does not, and tidies up."""
        await asyncio.wait([self.exited], timeout=wait_s)
        self.kill()

    def kill(self) -> None:
        """Ends the process at once, if it has not ended, and removes the sockets."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._requests.close(linger=0)
        self._events.close(linger=0)
        self._context.term()
        shutil.rmtree(self._dir, ignore_errors=True)


def in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Runs the function in a daemon thread of its own: unlike an executor's, it never holds up the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():  # its awaiter was cancelled
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # T may include None

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True).start()
    return future
