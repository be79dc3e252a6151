"""The CPU as a platform: what it reports, and what it hands out."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairlead.errors import ConfigError
from fairlead.interface import PLATFORM_API, AttentionShape, AttentionSpec, Device
from fairlead_cpu import memory, native, plugin
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.platform import CpuPlatform

SHAPE = AttentionShape(
    spec=AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25),
    num_layers=2,
    block_size=16,
    dtype="float32",
)
GIB = 2**30


@pytest.fixture
def platform() -> CpuPlatform:
    devices = plugin.probe()
    assert isinstance(devices, tuple)
    return CpuPlatform(devices[0])


def test_probe_finds_the_host() -> None:
    (device,) = plugin.probe()
    assert isinstance(device, Device)
    assert device.name == "cpu:0"
    assert "kernels" in device.description
    assert "threads" in device.description
    assert device.memory_bytes == memory.info().total_bytes
    (spec,) = plugin.fairlead_platforms()
    assert (spec.name, spec.api_version, spec.priority) == ("cpu", PLATFORM_API, 0)
    assert spec.create(device).name == "cpu"


def test_registration_and_probe_import_no_torch() -> None:
    code = "import sys; from fairlead_cpu import plugin; plugin.fairlead_platforms()[0].probe(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "fairlead_cpu.plugin" in run.stdout.split()
    assert "torch" not in run.stdout.split()


def test_memory_is_what_the_host_has(platform: CpuPlatform) -> None:
    info = platform.memory_info()
    assert 0 < info.free_bytes <= info.total_bytes


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of 8 GiB, 6 available; the folder stands for the control group's files."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {8 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {6 * GIB // 1024} kB\nHugePages_Total: 0\n"
    )
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_memory_without_a_control_group(host: Path) -> None:
    assert memory.info() == memory.MemoryInfo(total_bytes=8 * GIB, free_bytes=6 * GIB)


@pytest.mark.parametrize("limit", ["max\n", str(9 * GIB), "no number", ""])
def test_a_limit_above_the_host_is_none(host: Path, limit: str) -> None:
    (host / "memory.max").write_text(limit)
    assert memory.info() == memory.MemoryInfo(total_bytes=8 * GIB, free_bytes=6 * GIB)


@pytest.mark.parametrize(
    ("limit", "used", "inactive", "free"),
    [
        (2 * GIB, GIB // 2, 0, 2 * GIB - GIB // 2),
        (2 * GIB, GIB // 2, GIB // 4, 2 * GIB - GIB // 4),  # the kernel drops cached files before it refuses memory
        (7 * GIB, 0, 0, 6 * GIB),  # the host has less than the group may use
        (2 * GIB, 3 * GIB, 0, 0),
    ],
)
def test_a_control_group_limits_memory(host: Path, limit: int, used: int, inactive: int, free: int) -> None:
    (host / "memory.max").write_text(f"{limit}\n")
    (host / "memory.current").write_text(f"{used}\n")
    (host / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 7\n")
    assert memory.info() == memory.MemoryInfo(total_bytes=limit, free_bytes=free)


def test_a_control_group_that_does_not_say_what_is_used(host: Path) -> None:
    (host / "memory.max").write_text(f"{2 * GIB}\n")
    assert memory.info() == memory.MemoryInfo(total_bytes=2 * GIB, free_bytes=2 * GIB)


def test_memory_of_a_host_without_proc(host: Path) -> None:
    (host / "meminfo").unlink()
    info = memory.info()
    assert info.total_bytes > 2**26
    assert info.free_bytes == info.total_bytes // 2


def test_allocated_bytes_fall_back_to_zero_when_tensors_die() -> None:
    allocator = HostAllocator()
    assert allocator.allocated_bytes("weights") == 0
    first = allocator.empty((10, 3), torch.bfloat16, tag="weights")
    second = allocator.empty((7,), torch.float32, tag="kv_cache")
    assert first.is_contiguous()
    assert (first.shape, first.dtype) == ((10, 3), torch.bfloat16)
    assert allocator.allocated_bytes("weights") == 60
    assert allocator.allocated_bytes("kv_cache") == 28
    parameter, view = torch.nn.Parameter(first, requires_grad=False), second[2:]
    del first, second
    gc.collect()
    assert allocator.allocated_bytes("weights") == 60, "a parameter still holds it"
    assert allocator.allocated_bytes("kv_cache") == 28, "a view still holds it"
    del parameter, view
    gc.collect()
    assert allocator.allocated_bytes("weights") == allocator.allocated_bytes("kv_cache") == 0


def test_an_allocator_of_another_engine_counts_apart() -> None:
    a, b = HostAllocator(), HostAllocator()
    kept = a.empty((4,), torch.float32, tag="weights")
    assert (a.allocated_bytes("weights"), b.allocated_bytes("weights")) == (kept.nbytes, 0)


def test_too_large_an_allocation_is_a_memory_error() -> None:
    allocator = HostAllocator()
    with pytest.raises(MemoryError, match="kv_cache"):
        allocator.empty((2**60,), torch.float32, tag="kv_cache")
    assert allocator.allocated_bytes("kv_cache") == 0


def test_attention_backends_are_made_by_name(platform: CpuPlatform) -> None:
    kernels = native.kernels()
    names = () if kernels is None else ("native",)
    assert platform.attention_backends() == (*names, "sdpa", "reference")
    assert platform.capabilities.batch_invariant == (kernels is not None)
    for name in platform.attention_backends():
        backend = platform.attention(name, SHAPE)
        assert backend.name == name
        assert backend.block_bytes() == 2 * 2 * 16 * 2 * 16 * 4
    assert platform.allocator.allocated_bytes("kv_cache") == 0


def test_an_unknown_backend_is_an_error_that_lists_them(platform: CpuPlatform) -> None:
    with pytest.raises(ConfigError, match="no attention backend 'flash'; it has: (native, )?sdpa, reference"):
        platform.attention("flash", SHAPE)


def test_defaults_are_within_the_capabilities(platform: CpuPlatform) -> None:
    assert platform.defaults.dtype in platform.capabilities.dtypes
    assert platform.defaults.block_size in platform.capabilities.block_sizes
    assert 0 < platform.defaults.device_memory_utilization <= 1
    platform.synchronize()
