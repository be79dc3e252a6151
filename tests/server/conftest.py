"""A server in a thread over the fake engine, and the real one as a process."""

import asyncio
import importlib.util
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from fairlead.config import EngineConfig, ServerConfig
from fairlead.engine import connection
from fairlead.engine.async_engine import AsyncEngine
from fairlead_server.app import create_app
from fairlead_server.serve import uvicorn_config

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}
FAKE_ENGINE = (sys.executable, "-P", str(Path(__file__).with_name("fake_engine.py")))


@pytest.fixture(scope="session")
def fake() -> types.ModuleType:
    """The module of the fake engine: its limits, and the tokens that ask for trouble."""
    spec = importlib.util.spec_from_file_location("fake_engine", FAKE_ENGINE[-1])
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["fake_engine"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def offline() -> dict[str, str]:
    """The environment of processes that load the real engine."""
    return OFFLINE


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose sockets have addresses that fit; those of tmp_path need not, under pytest-xdist."""
    with tempfile.TemporaryDirectory(prefix="f-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def until() -> Callable[..., bool]:
    return wait_until


@pytest.fixture(scope="session")
def alive() -> Callable[[int], bool]:
    return is_alive


@pytest.fixture(scope="session")
def children() -> Callable[[int], set[int]]:
    return descendants


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether the condition became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> set[int]:
    """All processes below one, by /proc."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except FileNotFoundError:
            continue
    found: set[int] = set()
    fresh = {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


class ServerInThread:
    """The application over the fake engine, on a real port of this process."""

    def __init__(self, server: ServerConfig, **settings: object) -> None:
        self._server, self._settings = server, settings
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread.start()
        assert self._started.wait(120), "the server over the fake engine did not start"

    async def _run(self) -> None:
        self.engine = await AsyncEngine.start(EngineConfig.of(model="demo", **self._settings))
        self.app = app = create_app(self.engine, self._server)
        self.service = app.state.service
        self._http = uvicorn.Server(uvicorn_config(app, self._server))
        self._started.set()
        await self._http.serve(sockets=[self._listener])
        await self.engine.shutdown()

    def close(self) -> None:
        self._http.should_exit = True
        self._thread.join(30)
        self._listener.close()
        assert not self._thread.is_alive()


@contextmanager
def server_in_thread(server_config: ServerConfig | None = None, **settings: object) -> Iterator[ServerInThread]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "COMMAND", FAKE_ENGINE)
        server = ServerInThread(server_config or ServerConfig(), **settings)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def fake_server() -> Iterator[ServerInThread]:
    """A server over the fake engine that all tests share."""
    with server_in_thread() as server:
        yield server


@pytest.fixture(scope="session")
def client(fake_server: ServerInThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake_server.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[ServerInThread]]:
    """Makes a server over a fake engine of its own: `with serving(ServerConfig(...), max_num_seqs=1) as server`."""
    return server_in_thread


@pytest.fixture
def doomed_server() -> Iterator[ServerInThread]:
    """A server over a fake engine of its own, which the test may kill."""
    with server_in_thread() as server:
        yield server


@pytest.fixture
def fake_engine_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """AsyncEngine.start spawns the fake engine in this test."""
    monkeypatch.setattr(connection, "COMMAND", FAKE_ENGINE)


class ServerProcess:
    """`fairlead serve` as a process of its own; its stderr is read to the end by a thread."""

    def __init__(self, *arguments: str, is_fake: bool = False) -> None:
        program = [str(Path(__file__).with_name("serve_fake.py"))] if is_fake else ["-m", "fairlead_server"]
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=OFFLINE,
        )
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self._lines.extend(iter(self.process.stderr.readline, ""))

    @property
    def stderr(self) -> str:
        return "".join(self._lines)

    def wait_for_url(self, seconds: float = 120) -> str:
        def found() -> bool:
            return "listening" in self.stderr or self.process.poll() is not None

        assert wait_until(found, seconds), self.stderr
        match = re.search(r"listening +(http://\S+)/v1", self.stderr)
        assert match, self.stderr
        return match[1]

    def engine_pids(self) -> set[int]:
        return descendants(self.process.pid)

    def wait(self, seconds: float) -> int:
        status = self.process.wait(seconds)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait(30)


@pytest.fixture
def start_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts `fairlead serve` with the given arguments; ends what is left of it after the test."""
    started: list[ServerProcess] = []

    def start(*arguments: str, is_fake: bool = False) -> ServerProcess:
        started.append(ServerProcess(*arguments, is_fake=is_fake))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def start_fake_server(start_server: Callable[..., ServerProcess]) -> Callable[..., ServerProcess]:
    """The same over the fake engine, where the model is not the point."""
    return partial(start_server, "demo", is_fake=True)


@pytest.fixture(scope="module")
def start_module_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts a `fairlead serve` that the tests of a module share; it must end well when they have."""
    started: list[ServerProcess] = []

    def start(*arguments: str) -> ServerProcess:
        started.append(ServerProcess(*arguments))
        return started[-1]

    yield start
    for server in started:
        server.process.terminate()
        assert server.wait(60) == 0, server.stderr


@pytest.fixture(scope="module")
def module_server(start_module_server: Callable[..., ServerProcess]) -> ServerProcess:
    """One `fairlead serve demo` for the tests of a module."""
    return start_module_server("demo", "--port", "0")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """`serve` only notes its configs."""
    from fairlead_server import serve

    configs: list[tuple[Any, Any]] = []
    monkeypatch.setattr(serve, "serve", lambda engine, server: configs.append((engine, server)) or 0)
    return configs
