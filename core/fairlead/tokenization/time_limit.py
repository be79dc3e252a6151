"""A limit on how long the Python code of a thread may compute, for templates: they are programs that come with models.

Time is the thread's own CPU time where the system tells it, so that a busy machine makes no difference. One watching
thread serves all limits and looks every WATCH_S: a thread of its own for each would cost 0.1 ms a time.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

WATCH_S = 0.05


class TimeLimitError(Exception):
    """The code took too long and was ended."""


@dataclass(eq=False, slots=True, kw_only=True)
class _Block:
    """What runs under a limit, in which thread, and until when by that thread's clock."""

    thread: int
    end: float


_blocks: set[_Block] = set()
_lock = threading.Lock()
_busy = threading.Event()
_watcher: threading.Thread | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the block by a TimeLimitError, raised inside it, once its thread has computed for so long.

    The interpreter raises it between two instructions of the thread, so that one long call into C runs to its end.
    Blocks of one thread do not lie in each other.
    """
    global _watcher
    thread = threading.get_ident()
    block = _Block(thread=thread, end=_clock(thread) + seconds)
    with _lock:
        _blocks.add(block)
        _busy.set()
        if _watcher is None or not _watcher.is_alive():  # none lives on in a forked process
            _watcher = threading.Thread(target=_watch, name="time limits", daemon=True)
            _watcher.start()
    try:
        yield
    finally:
        with _lock:
            if block in _blocks:
                _blocks.remove(block)
            else:
                _raise_in(thread, None)  # what has not been raised yet must not come later


def _watch() -> None:
    while True:
        _busy.wait()
        time.sleep(WATCH_S)
        with _lock:
            for block in [block for block in _blocks if _clock(block.thread) > block.end]:
                _blocks.remove(block)
                _raise_in(block.thread, TimeLimitError)
            if not _blocks:
                _busy.clear()


def _raise_in(thread: int, error: type[Exception] | None) -> None:
    raised = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)


def _clock(thread: int) -> float:
    """Seconds that the thread has computed; of any clock where the system tells no such time of another thread."""
    if hasattr(time, "pthread_getcpuclockid"):
        return time.clock_gettime(time.pthread_getcpuclockid(thread))
    return time.monotonic()
