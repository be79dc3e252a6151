"""How much memory this process may use: the host's, or its control group's where that is less. No torch."""

import os
from pathlib import Path

from fairlead.interface import MemoryInfo

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # version 2; the root a container sees is its own group


def info() -> MemoryInfo:
    """Total and available bytes now."""
    total, free = _host()
    limit = _read_int(_CGROUP / "memory.max")
    if limit is not None and limit < total:
        used = max((_read_int(_CGROUP / "memory.current") or 0) - _reclaimable(), 0)
        total, free = limit, min(free, max(limit - used, 0))
    return MemoryInfo(total_bytes=total, free_bytes=free)


def _host() -> tuple[int, int]:
    if _MEMINFO.is_file():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return int(fields["MemTotal"].split()[0]) * 1024, int(fields["MemAvailable"].split()[0]) * 1024
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total // 2  # systems without /proc do not say what is free; half is a careful guess


def _reclaimable() -> int:
    """Bytes of cached files, such as a checkpoint just read, that the kernel drops before it refuses memory."""
    try:
        fields = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:  # no control group here
        return 0
    return int(fields.get("inactive_file", 0))


def _read_int(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:  # no control group here
        return None
    return int(text) if text.isdigit() else None
