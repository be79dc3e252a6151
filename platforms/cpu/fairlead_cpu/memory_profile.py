"""What a piece of work takes of this process's memory, at its peak. No torch.

Where Linux lets a process reset its own high-water mark, that tells the peak to within some dozens of pages per
processor, in which it counts; else a thread samples. Pages of mapped files that the work is the first to touch, such as
code of libraries, count too.
Source: proc_pid_status(5) and proc_pid_clear_refs(5), the value 5.
"""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path

from fairlead.interface import MemoryProfile

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_S = 0.001


def profile(work: Callable[[], None]) -> MemoryProfile | None:
    """Runs the work; returns what it took, or None where the system has no account of it."""
    _give_back_freed()
    before = _read("VmRSS")
    if before is None:
        work()
        return None
    measure = _by_high_water_mark if _reset_high_water_mark() else _by_sampling
    peak = measure(work)
    kept = max((_read("VmRSS") or 0) - before, 0)
    return MemoryProfile(peak_bytes=max(peak - before, kept), kept_bytes=kept)


def _by_high_water_mark(work: Callable[[], None]) -> int:
    work()
    return _read("VmHWM") or 0


def _by_sampling(work: Callable[[], None]) -> int:
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(_SAMPLE_S):
            peak = max(peak, _read("VmRSS") or 0)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join()
    return peak


def _reset_high_water_mark() -> bool:
    """Sets VmHWM to what is resident now; False where that may not be done."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # an older kernel, or a sandbox that keeps the file from us
        return False
    return _read("VmHWM") is not None


def _read(field: str) -> int | None:
    """Bytes of a field of /proc/self/status."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:  # no such file on this system
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _give_back_freed() -> None:
    """Returns freed memory to the system: what glibc keeps would serve the work, and not be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
