"""What is read of a host, on made-up trees of /proc and /sys."""

from pathlib import Path

import pytest

from fairlead_server.host import Cores, Host

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Host:
    meminfo = f"MemTotal: {8 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {6 * GIB // 1024} kB\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Host(root)


def test_memory_without_a_control_group(tmp_path: Path) -> None:
    memory = write(tmp_path, {}).memory()
    assert (memory.total_bytes, memory.free_bytes, memory.limit_bytes) == (8 * GIB, 6 * GIB, None)


@pytest.mark.parametrize(
    ("group", "limits"),
    [
        ("0::/a/b\n", {"a/b/memory.max": f"{2 * GIB}\n", "a/b/memory.current": f"{GIB}\n"}),
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": f"{2 * GIB}\n", "a/memory.current": f"{GIB}\n"}),
        ("0::/\n", {"memory.max": f"{2 * GIB}\n", "memory.current": f"{GIB}\n"}),
        (
            "5:cpu,cpuacct:/x\n4:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": f"{2 * GIB}\n", "memory/x/memory.usage_in_bytes": f"{GIB}\n"},
        ),
    ],
)
def test_the_control_group_or_one_above_it_limits_memory(tmp_path: Path, group: str, limits: dict[str, str]) -> None:
    files = {"proc/self/cgroup": group, **{f"sys/fs/cgroup/{name}": text for name, text in limits.items()}}
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.free_bytes, memory.limit_bytes) == (2 * GIB, GIB, 2 * GIB)


def test_cached_files_count_as_free(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    files = {"proc/self/cgroup": "0::/\n", f"{top}/memory.max": f"{2 * GIB}", f"{top}/memory.current": f"{2 * GIB}"}
    files[f"{top}/memory.stat"] = f"anon 1\ninactive_file {GIB}\n"
    assert write(tmp_path, files).memory().free_bytes == GIB


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({"proc/self/cgroup": "5:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_cores(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert write(tmp_path, files).cores().quota == quota


def test_the_usable_cores_are_the_least_of_all_bounds() -> None:
    assert Cores(online=8, affinity=4, quota=1.5, num_nodes=1).usable == 1.5
    assert Cores(online=8, affinity=4, quota=None, num_nodes=1).usable == 4
    assert Cores(online=8, affinity=None, quota=None, num_nodes=1).usable == 8


def test_memory_nodes_are_counted(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"sys/devices/system/node/node{i}").mkdir(parents=True)
    assert write(tmp_path, {}).cores().num_nodes == 2


@pytest.mark.parametrize(
    ("text", "model", "flags"),
    [
        ("processor: 0\nvendor_id: V\nmodel name : M 1\nflags : b a\n\nprocessor: 1\nflags: c\n", "M 1", ["a", "b"]),
        ("processor : 0\nFeatures : fp asimd\n", None, ["asimd", "fp"]),
        ("vendor_id : V/S\nfeatures : vx\n", "V/S", ["vx"]),
        ("", None, []),
    ],
)
def test_the_processor_and_its_flags(tmp_path: Path, text: str, model: str | None, flags: list[str]) -> None:
    assert write(tmp_path, {"proc/cpuinfo": text}).processor() == (model, flags)


def test_limits_are_named() -> None:
    limits = Host().limits()
    assert set(limits) == {"open files", "processes", "locked bytes"}
    assert limits["open files"].soft is None or limits["open files"].soft > 0
