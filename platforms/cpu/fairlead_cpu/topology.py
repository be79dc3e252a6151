"""Which cores this process may use: affinity, control group quota, and one thread per physical core. No torch."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from fairlead.errors import ConfigError

THREADS_VARIABLE = "FAIRLEAD_CPU_THREADS"
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # version 2; the root a container sees is its own group


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The pool's threads: as many as `cpus`, of which the workers (all but the first) are bound."""

    cpus: tuple[int, ...]
    bound: bool
    reason: str

    def __str__(self) -> str:
        where = f", workers bound to {','.join(map(str, self.cpus[1:]))}" if self.bound and len(self.cpus) > 1 else ""
        return f"{len(self.cpus)} threads ({self.reason}{where})"


def layout() -> Layout:
    """One thread per physical core that the process may use, at most what the control group's quota pays for.

    FAIRLEAD_CPU_THREADS, or else OMP_NUM_THREADS, asks for another number. Threads beyond the cores are not bound, nor
    are those of a process with a quota below its cores: the kernel knows better which core is free.
    Raises ConfigError for a number that is none.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = _first_siblings(allowed)
    for variable in (THREADS_VARIABLE, "OMP_NUM_THREADS"):
        asked = os.environ.get(variable, "").split(",")[0].strip()
        if not asked:
            continue
        if not asked.isdigit() or int(asked) == 0:
            raise ConfigError(f"{variable}={asked}: expected a number of threads above 0")
        others = [cpu for cpu in allowed if cpu not in cores]
        cpus = tuple((cores + others)[: int(asked)])
        missing = int(asked) - len(cpus)
        return Layout(cpus=cpus + (-1,) * missing, bound=missing == 0, reason=f"{variable}={asked}")
    quota = _quota()
    if quota is not None and quota < len(cores):
        return Layout(cpus=tuple(cores[:quota]), bound=False, reason=f"control group quota of {quota} cores")
    smt = f" of {len(allowed)} hardware threads" if len(cores) < len(allowed) else ""
    return Layout(cpus=tuple(cores), bound=hasattr(os, "sched_getaffinity"), reason=f"{len(cores)} cores{smt}")


def _first_siblings(cpus: list[int]) -> list[int]:
    """The first hardware thread of each physical core, nearest first by NUMA node as the system numbers them."""
    seen: set[str] = set()
    first = []
    for cpu in cpus:
        try:
            core = (_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:  # the system does not say: every processor is a core
            core = str(cpu)
        if core not in seen:
            seen.add(core)
            first.append(cpu)
    return first


def _quota() -> int | None:
    """How many cores the control group's quota pays for, rounded up; None without a limit."""
    try:
        quota, period = _QUOTA.read_text().split()
    except (OSError, ValueError):  # no control group here
        return None
    return None if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
