"""Tier 7: `fairlead serve demo` on the platform, as a process, asked over HTTP."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from fairlead.testing.conformance.check import Check, Outcome
from fairlead.testing.conformance.subject import Subject

START_S, END_S = 45.0, 10.0
COMMAND = "fairlead serve demo"


def checks(subject: Subject) -> Iterator[Check]:
    """One check: each question needs the server to be there."""
    yield Check(tier="server", name=COMMAND, hook=COMMAND, run=lambda: _run(subject))


def _run(subject: Subject) -> Outcome:
    server = _Server(subject)
    try:
        server.ask_all()
        server.stop()
    finally:
        server.kill()
    return Outcome()


class _Server:
    """A server process, whose standard error a thread reads to the end."""

    def __init__(self, subject: Subject) -> None:
        self.s = subject
        command = [sys.executable, "-m", "fairlead_server", "demo", "--port", "0", "--max-model-len", "256"]
        command += ["--platform", subject.name, "--device", subject.device.name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._lines: list[str] = []
        self._is_up = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._is_up.wait(START_S)
        found = re.search(r"listening +http://([^:]+):(\d+)", "".join(self._lines))
        if found is None:
            self.kill()
            subject.fail(COMMAND, f"a server within {START_S:g} s", self._last_words())
        self._host, self._port = found[1], int(found[2])

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if re.search(r"listening +http", line):
                self._is_up.set()
        self._is_up.set()  # it has ended

    def _last_words(self) -> str:
        errors = [line.strip() for line in self._lines if line.startswith("error:")]
        return (errors or [line.strip() for line in self._lines] or ["nothing"])[-1]

    def ask_all(self) -> None:
        """Health, models, a completion whole and streamed, metrics."""
        self._ask("GET", "/health")
        models = json.loads(self._ask("GET", "/v1/models"))
        self.s.expect(models["data"][0]["id"] == "demo", COMMAND, "the model demo in /v1/models", models)
        request: dict[str, Any] = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 16, "temperature": 0}
        request["ignore_eos"] = True
        whole = json.loads(self._ask("POST", "/v1/completions", request))
        num_tokens = whole["usage"]["completion_tokens"]
        self.s.expect(num_tokens == 16, COMMAND, "a completion of 16 tokens", num_tokens)
        streamed = self._ask("POST", "/v1/completions", request | {"stream": True})
        events = [line[6:] for line in streamed.splitlines() if line.startswith("data: ")]
        text = "".join(json.loads(event)["choices"][0]["text"] for event in events if event != "[DONE]")
        self.s.expect(text == whole["choices"][0]["text"], COMMAND, "the same text streamed and whole", repr(text))
        self.s.expect("fairlead:" in self._ask("GET", "/metrics"), COMMAND, "metrics", "none")

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> str:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=START_S)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        except OSError as error:
            self.s.fail(f"{COMMAND}, {method} {path}", "an answer", f"{type(error).__name__}; {self._last_words()}")
        finally:
            connection.close()
        self.s.expect(answer.status == 200, f"{COMMAND}, {method} {path}", "200", f"{answer.status}: {text}")
        return text

    def stop(self) -> None:
        """A signal ends it, in order."""
        self._process.send_signal(signal.SIGTERM)
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.s.fail(COMMAND, f"an end within {END_S:g} s of SIGTERM", "none")
        self.s.expect(status == 0, COMMAND, "exit status 0 after SIGTERM", f"{status}: {self._last_words()}")

    def kill(self) -> None:
        """Leaves nothing behind; the engine's process ends with its parent."""
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(END_S)
        assert self._process.stderr is not None
        self._process.stderr.close()
