"""The engine's process, started by AsyncEngine as `python -m fairlead.engine.process`.

Its settings arrive on standard input, which its parent then holds open: when that pipe ends, the parent is gone and
so is this process. Interrupts and SIGTERM are the parent's to answer; it sends Stop.
"""

import contextlib
import gc
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import zmq

from fairlead.config import EngineConfig
from fairlead.engine.messages import (
    Abort,
    Add,
    Failed,
    FromEngine,
    Heartbeat,
    Ready,
    Rejected,
    Startup,
    Step,
    Stop,
    ToEngine,
    decode_startup,
    decode_to_engine,
    encode,
)
from fairlead.errors import RequestError
from fairlead.request import EngineInfo, EngineStats, Request, SequenceDelta

HEARTBEAT_S = 1.0
LENGTH_BYTES = 8  # the startup message on standard input follows its own length, little-endian
FLUSH_MS = 2000


class Engine(Protocol):
    """What this process drives: EngineCore."""

    info: EngineInfo

    @property
    def has_work(self) -> bool: ...

    def add_request(self, request: Request) -> None: ...

    def abort(self, request_id: str, index: int | None = None) -> None: ...

    def step(self) -> list[SequenceDelta]: ...

    def take_started(self) -> list[str]: ...

    def take_rejected(self) -> list[tuple[str, RequestError]]: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Channel:
    """The process's ends of the two sockets."""

    def __init__(self, startup: Startup) -> None:
        self._context = zmq.Context()
        self._requests = self._context.socket(zmq.PULL)
        self._events = self._context.socket(zmq.PUSH)
        self._requests.set_hwm(0)
        self._events.set_hwm(0)  # a slow front end never stalls a step
        self._requests.connect(f"ipc://{startup.requests_path}")
        self._events.connect(f"ipc://{startup.events_path}")

    def receive(self, wait_s: float) -> Iterator[ToEngine]:
        """The messages that are there; waits at most `wait_s` for the first one."""
        if wait_s and not self._requests.poll(int(wait_s * 1000)):
            return
        with contextlib.suppress(zmq.Again):
            while True:
                yield decode_to_engine(self._requests.recv(zmq.NOBLOCK))

    def send(self, message: FromEngine) -> None:
        """Queues the message; never waits."""
        self._events.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Waits a moment until the last message is out, then closes."""
        self._context.destroy(linger=FLUSH_MS)


def serve(engine: Engine, channel: Channel) -> None:
    """Takes requests, steps while there is work, and reports each step as one message; returns on Stop."""
    while True:
        for message in channel.receive(0 if engine.has_work else HEARTBEAT_S):
            if isinstance(message, Stop):
                return
            _apply(message, engine, channel)
        if engine.has_work:
            deltas = engine.step()
            channel.send(Step(deltas, engine.stats(), engine.take_started()))
            for request_id, error in engine.take_rejected():
                channel.send(_rejected(request_id, error))
        else:
            channel.send(Heartbeat(engine.stats()))


def _apply(message: Add | Abort, engine: Engine, channel: Channel) -> None:
    if isinstance(message, Abort):
        engine.abort(message.request_id, message.index)
        return
    try:
        engine.add_request(message.request)
    except RequestError as error:
        channel.send(_rejected(message.request.request_id, error))


def _rejected(request_id: str, error: RequestError) -> Rejected:
    return Rejected(request_id, type(error).__name__, str(error), error.param)


def run(startup: Startup, load: Callable[[EngineConfig], Engine]) -> int:
    """Loads the engine and serves it; whatever ends it early goes to the parent as Failed. Returns the exit status."""
    channel = Channel(startup)
    try:
        engine = load(startup.config)
        settle_memory()
        channel.send(Ready(engine.info))
        serve(engine, channel)
        engine.close()
        return 0
    except BaseException as error:  # a plugin may raise anything, SystemExit included; the parent hears of it
        channel.send(Failed(type(error).__name__, str(error), traceback.format_exc()))
        return 1
    finally:
        channel.close()


def settle_memory() -> None:
    """Takes what is there for good out of the garbage collector's sight.

    Or it would walk all of it time and again, modules included, and nothing would move: 130 ms for 290,000 objects.
    """
    gc.collect()
    gc.freeze()


def main(load: Callable[[EngineConfig], Engine]) -> int:
    """The process from start to end; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    startup = decode_startup(_read(int.from_bytes(_read(LENGTH_BYTES), "little")))
    give_way(startup.niceness)
    threading.Thread(target=_end_with_parent, args=(Path(startup.requests_path).parent,), daemon=True).start()
    return run(startup, load)


def give_way(niceness: int) -> None:
    """Lowers the priority of this thread, and of those that it will start.

    Linux may weigh whole sessions against each other, and threads only within theirs: this process, which has one of
    its own, is then weighed by /proc/self/autogroup.
    """
    os.nice(niceness)
    with contextlib.suppress(OSError):  # there are no such groups here
        Path("/proc/self/autogroup").write_text(str(niceness), encoding="ascii")


def _read(length: int) -> bytes:
    """Reads from the descriptor itself: a buffered reader's lock, held by a daemon thread, would block the exit."""
    data = b""
    while len(data) < length:
        piece = os.read(0, length - len(data))
        if not piece:
            sys.exit(1)  # the parent died before it had said anything
        data += piece
    return data


def _end_with_parent(socket_dir: Path) -> None:
    os.read(0, 1)  # the parent writes nothing more: this returns when its end of the pipe closes
    shutil.rmtree(socket_dir, ignore_errors=True)
    os._exit(1)


def _load(config: EngineConfig) -> Engine:
    from fairlead.engine.engine import EngineCore  # imports torch; in here, so that an import error is reported too

    engine = EngineCore(config)
    engine.prepare_structured()
    return engine


if __name__ == "__main__":
    sys.exit(main(_load))
