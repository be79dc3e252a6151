"""What the operating system and its control groups let this process have. No torch."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """`affinity` is the number of cores that this process may run on, `quota` how many its control group may use up,
    None where the system knows no such thing. `usable` is the least of them."""

    online: int
    affinity: int | None
    quota: float | None
    num_nodes: int

    @property
    def usable(self) -> float:
        return min(n for n in (self.online, self.affinity, self.quota) if n is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """In bytes; `limit_bytes` is the control group's, None if it has none below the host's total."""

    total_bytes: int
    free_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A resource limit; None is unlimited."""

    soft: int | None
    hard: int | None


class Host:
    """Reads /proc and /sys below `root`; what is not there is None or empty."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def processor(self) -> tuple[str | None, list[str]]:
        """Its model and its flags."""
        model: str | None = None
        flags: list[str] = []
        for line in self._lines("proc/cpuinfo"):
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model", "vendor_id") and (model is None or key.strip() == "model name"):
                model = value.strip()
            elif key.strip().lower() in ("flags", "features") and not flags:
                flags = sorted(value.split())
        return model, flags

    def cores(self) -> Cores:
        """How many there are, and how many of them are ours."""
        affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        nodes = list((self.root / "sys/devices/system/node").glob("node[0-9]*"))
        quotas = [quota for folder in self._groups("cpu") if (quota := self._quota(folder)) is not None]
        return Cores(
            online=os.cpu_count() or 1,
            affinity=affinity,
            quota=min(quotas, default=None),
            num_nodes=max(len(nodes), 1),
        )

    def memory(self) -> HostMemory:
        """The host's, or the control group's where that is less."""
        fields = {key: value for key, _, value in (line.partition(":") for line in self._lines("proc/meminfo"))}
        if "MemTotal" in fields:
            total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
        else:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            free = total // 2  # systems without /proc do not say; half is a careful guess
        limit_bytes = None
        for folder in self._groups("memory"):
            limit = self._number(folder, "memory.max", "memory.limit_in_bytes")
            if limit is not None and limit < (limit_bytes or total):
                used = self._number(folder, "memory.current", "memory.usage_in_bytes") or 0
                cached = {k: int(v) for k, v in (line.split() for line in self._lines_of(folder / "memory.stat"))}
                limit_bytes, free = limit, min(free, max(limit - used + cached.get("inactive_file", 0), 0))
        return HostMemory(total_bytes=limit_bytes or total, free_bytes=free, limit_bytes=limit_bytes)

    def limits(self) -> dict[str, Limit]:
        """Resource limits by name."""
        if resource is None:
            return {}
        names = {"open files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC", "locked bytes": "RLIMIT_MEMLOCK"}
        found = {}
        for name, key in names.items():
            soft, hard = (
                None if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(getattr(resource, key))
            )
            found[name] = Limit(soft=soft, hard=hard)
        return found

    def _groups(self, controller: str) -> Iterator[Path]:
        """The folders of this process's control group and of those above it: each of them limits."""
        top = self.root / "sys/fs/cgroup"
        for line in self._lines("proc/self/cgroup"):
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            base = top / controllers if controllers else top
            folder = base / path.strip("/")
            while folder != base:
                yield folder
                folder = folder.parent
            yield base

    def _quota(self, folder: Path) -> float | None:
        words = next(iter(self._lines_of(folder / "cpu.max")), "max").split()
        if len(words) == 2 and words[0].isdigit():
            return int(words[0]) / int(words[1])
        quota, period = self._number(folder, "cpu.cfs_quota_us"), self._number(folder, "cpu.cfs_period_us")
        return quota / period if quota is not None and period else None

    def _number(self, folder: Path, *names: str) -> int | None:
        for name in names:
            for line in self._lines_of(folder / name):
                return int(line) if line.strip().isdigit() else None
        return None

    def _lines(self, path: str) -> list[str]:
        return self._lines_of(self.root / path)

    def _lines_of(self, path: Path) -> list[str]:
        try:
            return path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # another system, or no such controller
            return []
