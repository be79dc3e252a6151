"""Tries out specifications in a process that may die of them: `python -m fairlead.sampling.structured.worker`.

JSON messages, each behind its length, on standard input and output. The first one brings the vocabulary. Then each
{"id", "backend", "kind", "text", "timeout_s"} is answered by {"id", "error"}; {"cancel": id} ends the one that runs.
Every specification is compiled in a fork, which is killed when its time is over and cannot take more than its memory.
"""

import base64
import contextlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from fairlead.sampling.structured.backend import Backend, GrammarError, Vocabulary, create_backend
from fairlead.sampling.structured.schema import check_spec

LENGTH_BYTES = 4
MAX_MEMORY_BYTES = 1 << 30  # beyond what the process holds before it compiles
STACK_BYTES = 2 << 20  # a quarter of what the engine's thread has, so what is not too deep here is not there
TOO_SLOW = "it takes longer than {:g} s to compile; make it smaller"
CANCELLED = "cancelled"
DIED = "it needs too much memory, or is nested too deeply, to be compiled; make it smaller"

Message = dict[str, Any]


def pack(message: Mapping[str, object]) -> bytes:
    """A message with its length before it."""
    data = json.dumps(message).encode()
    return len(data).to_bytes(LENGTH_BYTES, "little") + data


def read_message(descriptor: int) -> Message | None:
    """The next message; None at the end of the pipe."""
    head = _read(descriptor, LENGTH_BYTES)
    data = None if head is None else _read(descriptor, int.from_bytes(head, "little"))
    if data is None:
        return None
    message: Message = json.loads(data)
    return message


def _read(descriptor: int, size: int) -> bytes | None:
    pieces = []
    while size:
        piece = os.read(descriptor, min(size, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def vocabulary_message(vocabulary: Vocabulary) -> Message:
    """The vocabulary as the first message. Its tokenizer stays behind: it decides no more than which way is usual."""
    return {"tokens": [base64.b64encode(token).decode() for token in vocabulary.tokens]}


class Worker:
    """The process's loop."""

    def __init__(self, source: int, target: int, vocabulary: Vocabulary) -> None:
        self._source, self._target, self._vocabulary = source, target, vocabulary
        self._backends: dict[str, Backend] = {}

    def run(self) -> None:
        """Answers until the pipe ends."""
        while (message := read_message(self._source)) is not None:
            if "cancel" in message:
                continue  # its answer is out already
            name = message["backend"]
            if name not in self._backends:
                self._backends[name] = create_backend(name, self._vocabulary)
            error = self._try(self._backends[name], message)
            os.write(self._target, pack({"id": message["id"], "error": error}))

    def _try(self, backend: Backend, message: Message) -> str | None:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for descriptor in (reader, self._source, self._target):  # else it would hold the worker's pipes open
                os.close(descriptor)
            _compile_and_exit(backend, message["kind"], message["text"], writer)
        os.close(writer)
        try:
            return self._watch(reader, message["id"], message["timeout_s"])
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)

    def _watch(self, reader: int, number: int, timeout_s: float) -> str | None:
        deadline = time.monotonic() + timeout_s
        while True:
            ready = select.select([reader, self._source], [], [], max(deadline - time.monotonic(), 0))[0]
            if reader in ready:
                answer = _read_all(reader)
                return DIED if answer is None else answer or None
            if not ready:
                return TOO_SLOW.format(timeout_s)
            message = read_message(self._source)
            if message is None:
                sys.exit(0)
            if message.get("cancel") == number:
                return CANCELLED


def _read_all(reader: int) -> str | None:
    """The fork's whole answer, an empty one for success; None if it died before it had given one."""
    message = read_message(reader)
    return None if message is None else str(message["error"])


def _compile_and_exit(backend: Backend, kind: str, text: str, writer: int) -> None:
    """Runs in the fork and never returns."""
    _limit_memory()
    threading.stack_size(STACK_BYTES)
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(compile_error(backend, kind, text)))
    thread.start()
    thread.join()
    if answers:
        os.write(writer, pack({"error": answers[0]}))
    os._exit(0)


def compile_error(backend: Backend, kind: str, text: str) -> str:
    """What is wrong with a specification; nothing if it compiles and gives a first mask."""
    try:
        check_spec(kind, text)
        matcher = backend.compile(kind, text).start()
        row_W = np.zeros(backend.num_words, np.int32)
        matcher.fill_bitmask(row_W)
        return "" if row_W.any() else "no output can match it"
    except GrammarError as error:
        return str(error)
    except (RecursionError, MemoryError):
        return DIED


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # no /proc on some systems: the time limit holds there alone
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MAX_MEMORY_BYTES, held + MAX_MEMORY_BYTES))


def main() -> None:
    """The process from start to end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent's to answer; this process ends with its pipe
    target = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is no message
    first = read_message(0)
    if first is None:
        return
    vocabulary = Vocabulary(tokens=tuple(base64.b64decode(token) for token in first["tokens"]))
    Worker(0, target, vocabulary).run()


if __name__ == "__main__":
    main()
