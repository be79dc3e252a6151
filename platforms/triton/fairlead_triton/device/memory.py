"""What a device's memory holds, and what a piece of work takes of it."""

from collections.abc import Callable
from pathlib import Path

from fairlead.interface import MemoryInfo, MemoryProfile
from fairlead_triton.device.runtime import Runtime

_MEMINFO = Path("/proc/meminfo")


def info(runtime: Runtime) -> MemoryInfo:
    """By the driver, plus what torch's allocator holds for this process without using it.

    Drivers without the query (some of Intel's) leave the device's size and our own account, which knows no neighbours.
    """
    module, index = runtime.module, runtime.index
    allocated, reserved = module.memory_allocated(index), module.memory_reserved(index)
    try:
        free, total = module.mem_get_info(index)
    except RuntimeError:
        total = int(module.get_device_properties(index).total_memory)
        free = total - reserved
    return MemoryInfo(total_bytes=total, free_bytes=min(max(free + reserved - allocated, 0), total))


def profile(runtime: Runtime, work: Callable[[], None]) -> MemoryProfile:
    """By torch's account of this process: what others do on the device meanwhile is not in it."""
    module, index = runtime.module, runtime.index
    runtime.synchronize()
    before = module.memory_allocated(index)
    module.reset_peak_memory_stats(index)
    work()
    runtime.synchronize()
    kept = max(module.memory_allocated(index) - before, 0)
    peak = module.max_memory_allocated(index) - before
    return MemoryProfile(peak_bytes=max(peak, kept), kept_bytes=kept)


def host_bytes(meminfo: Path = _MEMINFO) -> int:
    """Host memory that is available, for KV blocks that leave the device; 0 where the system does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
