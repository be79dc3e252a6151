"""The engine's hold on the worker that tries out specifications."""

import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref

from fairlead.sampling.structured.backend import Vocabulary
from fairlead.sampling.structured.worker import CANCELLED, DIED, TOO_SLOW, pack, read_message, vocabulary_message

COMMAND = (sys.executable, "-P", "-m", "fairlead.sampling.structured.worker")
COMPILE_S = 2.5  # of one specification; bad ones must be refused within 5 s on a machine that has more to do
_START_S = 60.0  # a library may import a lot
_GRACE_S = 1.5  # what the worker itself may need beyond the time of the specification


__all__ = ["CANCELLED", "Checker"]


class Checker:
    """Finds out whether a specification compiles, without being in danger. One check at a time; `cancel` from outside.

    The worker starts with the first check, and again after one that killed even it.
    """

    def __init__(self, vocabulary: Vocabulary, *, timeout_s: float = COMPILE_S) -> None:
        self._vocabulary, self._timeout_s = vocabulary, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[[subprocess.Popen[bytes]], Checker] | None = None
        self._imported: set[str] = set()  # libraries that the worker has imported
        self._numbers = itertools.count()
        self._running: int | None = None
        self._lock = threading.Lock()  # of the pipe to the worker

    def check(self, backend: str, kind: str, text: str) -> str | None:
        """What is wrong with the specification, in one line; None if nothing is."""
        number = next(self._numbers)
        request = {"id": number, "backend": backend, "kind": kind, "text": text, "timeout_s": self._timeout_s}
        try:
            process = self._start() if self._process is None else self._process
            self._running = number
            self._send(process, pack(request))
            wait_s = self._timeout_s + _GRACE_S + (0 if backend in self._imported else _START_S)
            answer = self._answer(process, number, wait_s)
            if self._process is process:  # else it had to be killed
                self._imported.add(backend)
            return answer
        except OSError:
            self.close()
            return DIED
        finally:
            self._running = None

    def cancel(self) -> None:
        """Ends the check that runs, if there is one; it then says CANCELLED. Never waits: a worker that has not begun
        to read takes no such message, and the check goes on to its end."""
        number, process = self._running, self._process
        if number is None or process is None or not self._lock.acquire(blocking=False):
            return
        try:
            with contextlib.suppress(OSError, ValueError):
                _write(process, pack({"cancel": number}))
        finally:
            self._lock.release()

    def kill(self) -> None:
        """Ends the worker from another thread: the check that runs fails at once."""
        process = self._process
        if process is not None:
            _kill(process)

    def close(self) -> None:
        """Ends the worker; not while a check runs."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None
        self._imported.clear()

    @property
    def pid(self) -> int | None:
        """The worker's process, while there is one."""
        return None if self._process is None else self._process.pid

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the libraries repeat what the user sent
            bufsize=0,
            start_new_session=True,
        )
        self._process, self._finalizer = process, weakref.finalize(self, _end, process)
        self._send(process, pack(vocabulary_message(self._vocabulary)))
        return process

    def _send(self, process: "subprocess.Popen[bytes]", data: bytes) -> None:
        with self._lock:
            _write(process, data)

    def _answer(self, process: "subprocess.Popen[bytes]", number: int, wait_s: float) -> str | None:
        assert process.stdout is not None
        deadline = time.monotonic() + wait_s
        pipe = process.stdout.fileno()
        while True:
            if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
                self.close()
                return TOO_SLOW.format(self._timeout_s)
            message = read_message(pipe)
            if message is None:
                self.close()
                return DIED
            if message["id"] == number:
                error: str | None = message["error"]
                return error


def _write(process: "subprocess.Popen[bytes]", data: bytes) -> None:
    assert process.stdin is not None
    view = memoryview(data)
    while view:
        view = view[os.write(process.stdin.fileno(), view) :]


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its fork, too


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.returncode is None:
        _kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
