"""The engine's process: it ends with its parent, and leaves signals to it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from fairlead.config import EngineConfig
from fairlead.engine import messages
from fairlead.engine.process import HEARTBEAT_S, LENGTH_BYTES, Channel
from fairlead.request import EngineStats

FAKE_ENGINE = (sys.executable, "-P", str(Path(__file__).with_name("fake_engine.py")))
NICENESS = 3


class Parent:
    """Speaks to a fake engine process as EngineConnection does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "sockets"
        self.folder.mkdir()
        self._context = zmq.Context()
        self.requests, self.events = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self.requests.bind(f"ipc://{self.folder / 'requests'}")
        self.events.bind(f"ipc://{self.folder / 'events'}")
        paths = str(self.folder / "requests"), str(self.folder / "events")
        startup = messages.Startup(EngineConfig.of(model="demo"), *paths, niceness=NICENESS)
        data = messages.encode(startup)
        self.process = subprocess.Popen(FAKE_ENGINE, stdin=subprocess.PIPE)
        assert self.process.stdin is not None
        self.process.stdin.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        self.process.stdin.flush()

    def receive(self) -> messages.FromEngine:
        assert self.events.poll(10_000)
        return messages.decode_from_engine(self.events.recv())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._context.destroy(linger=0)


@pytest.fixture
def parent(short_path: Path) -> Iterator[Parent]:
    made = Parent(short_path)
    yield made
    made.close()


def test_an_idle_process_says_so_every_second(parent: Parent) -> None:
    assert isinstance(parent.receive(), messages.Ready)
    assert HEARTBEAT_S == 1.0
    assert parent.receive() == messages.Heartbeat(EngineStats())


def test_it_gives_way_as_it_was_told(parent: Parent) -> None:
    parent.receive()
    assert os.getpriority(os.PRIO_PROCESS, parent.process.pid) == os.nice(0) + NICENESS


def test_it_leaves_signals_to_its_parent_and_ends_on_stop(parent: Parent) -> None:
    parent.receive()
    for number in (signal.SIGINT, signal.SIGTERM):
        parent.process.send_signal(number)
    parent.receive()
    assert parent.process.poll() is None
    parent.requests.send(messages.encode(messages.Stop()))
    assert parent.process.wait(10) == 0


def test_it_ends_and_removes_the_sockets_when_its_parent_is_gone(parent: Parent) -> None:
    parent.receive()
    assert parent.process.stdin is not None
    parent.process.stdin.close()
    assert parent.process.wait(5) == 1
    assert not parent.folder.exists()


def test_it_ends_when_its_parent_dies_before_it_has_said_anything() -> None:
    done = subprocess.run(FAKE_ENGINE, stdin=subprocess.DEVNULL, timeout=30, check=False)
    assert done.returncode == 1


def test_bytes_that_are_no_message_end_it_with_the_reason(parent: Parent) -> None:
    parent.receive()
    parent.requests.send(b"\x80\x04K\x01.")
    last = parent.receive()
    assert isinstance(last, messages.Failed)
    assert last.error == "ProtocolError"
    assert parent.process.wait(10) == 1


def test_receiving_does_not_wait_while_there_is_work(short_path: Path, until: Callable[..., bool]) -> None:
    config = EngineConfig.of(model="demo")
    channel = Channel(messages.Startup(config, str(short_path / "requests"), str(short_path / "events")))
    assert list(channel.receive(0)) == []
    channel.close()
