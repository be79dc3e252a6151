"""Runs the checks of a platform in a process of their own, and outlives whatever happens to it. No torch."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fairlead.errors import PluginError
from fairlead.testing.conformance.check import TIERS, Result, failed

CHECK_S = 60.0  # how long one check may take
START_S = 120.0  # how long the process may take to import, to create the platform, and to list the checks
GRACE_S = 10.0  # how long the process may take beyond that to say so itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One check of a platform, as its process lists them."""

    tier: str
    name: str

    @property
    def id(self) -> str:
        """The check's."""
        return f"{self.tier}: {self.name}"


class Kit:
    """The checks of one platform. Close it: it holds a process.

    `tiers` restricts them; with `against` the outputs are compared with those of another platform as well. A check
    that takes more than `check_s` seconds is convicted, and the next one starts in a new process.
    """

    def __init__(
        self,
        platform: str,
        *,
        tiers: Sequence[str] = TIERS,
        device: str | None = None,
        against: str | None = None,
        full: bool = False,
        check_s: float = CHECK_S,
    ) -> None:
        self.platform, self._check_s = platform, check_s
        self._command = [sys.executable, "-m", "fairlead.testing.conformance.worker", "--platform", platform]
        self._command += [f"--start-timeout={START_S}", f"--timeout={check_s}", *(f"--tier={tier}" for tier in tiers)]
        self._command += [] if device is None else [f"--device={device}"]
        self._command += [] if against is None else [f"--against={against}"]
        self._command += ["--full"] if full else []
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def __enter__(self) -> "Kit":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def list(self) -> tuple[list[Listed], Result | None]:
        """The checks; or none, and the conviction of a platform that cannot even be made."""
        answer = self._ask({"list": True}, "contract: discovery")
        if "checks" not in answer:  # it hung or died: the answer is a result
            return [], Result(**answer)
        convicted = answer["failed"]
        return [Listed(**check) for check in answer["checks"]], None if convicted is None else Result(**convicted)

    def run(self, check_id: str) -> Result:
        """Runs one check of the list."""
        return Result(**self._ask({"run": check_id}, check_id))

    def close(self) -> None:
        """Ends the process and all that it has started."""
        if self._process is None:
            return
        process, self._process, self._unread = self._process, None, b""
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end_group(process)
            process.stdout.close()

    def _ask(self, command: dict[str, Any], check_id: str) -> dict[str, Any]:
        if self._process is None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        process = self._process
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(command).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:  # it has died already; reading says how
            pass
        line = self._read_line(START_S + self._check_s + GRACE_S)
        if line:
            answer: dict[str, Any] = json.loads(line)
            if answer.pop("ended", False):
                self.close_now()
            return answer
        got = self._died()
        tier, _, name = check_id.partition(": ")
        message = f"plugin {self.platform!r} broke the contract in {name}: expected a verdict, got {got}"
        result = failed(tier, name, message)
        return {field: getattr(result, field) for field in Result.__slots__}

    def _died(self) -> str:
        """Ends what is left; says how it ended."""
        process = self._process
        assert process is not None
        try:
            status = process.wait(1)
        except subprocess.TimeoutExpired:
            status = None
        self.close_now()
        if status is None:
            return f"no answer within {self._check_s:g} s: it hangs, and holds the interpreter's lock"
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"the end of the process ({how})"

    def close_now(self) -> None:
        """Ends the process without waiting for it."""
        if self._process is not None:
            _end_group(self._process)
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # what was still to be sent has no reader
                    pipe.close()
        self._process, self._unread = None, b""

    def _read_line(self, seconds: float) -> bytes:
        """Empty if none comes in time, or ever."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(seconds):
                    return b""
                piece = os.read(pipe, 65536)
                if not piece:
                    return b""
                self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def conform(kit: Kit, on_result: Callable[[Result], None] = lambda result: None) -> list[Result]:
    """Runs all checks of a kit; `on_result` hears of each at once. Raises PluginError if there is nothing to check."""
    results = []
    for result in _results(kit):
        on_result(result)
        results.append(result)
    if not results:
        raise PluginError(f"there is no check of platform {kit.platform!r} in these tiers")
    return results


def _results(kit: Kit) -> Iterator[Result]:
    checks, convicted = kit.list()
    if convicted is not None:
        yield convicted
    for check in checks:
        yield kit.run(check.id)


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """The process leads a session: what it started, such as a server, ends with it."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
