"""Discovery of AMD's devices, with the kernel driver's tree as data."""

from pathlib import Path
from typing import Any

import pytest

from fairlead_rocm import probe
from fairlead_rocm.probe import Machine, arch_of
from fairlead_triton.device.libraries import TorchBuild

ROCM = TorchBuild(version="2.13.0+rocm7.1", hip="7.1.25424")
MI300X = ("gfx942", 90402, 0xAA11, 192 * 2**30, 64)
W7900 = ("navi31", 110000, 0xBB22, 48 * 2**30, 32)


def node(root: Path, number: int, gpu: tuple[str, int, int, int, int] | None) -> None:
    folder = root / probe.NODES / str(number)
    (folder / "mem_banks/0").mkdir(parents=True)
    if gpu is None:  # a processor
        (folder / "name").write_text("\n")
        (folder / "properties").write_text("cpu_cores_count 64\nsimd_count 0\ngfx_target_version 0\n")
        (folder / "mem_banks/0/properties").write_text("heap_type 0\nsize_in_bytes 540000000000\n")
        return
    name, version, unique, size, wave = gpu
    (folder / "name").write_text(f"{name}\n")
    (folder / "properties").write_text(
        f"simd_count 1216\nwave_front_size {wave}\nlds_size_in_kb 64\ngfx_target_version {version}\n"
        f"unique_id {unique}\nvendor_id 4098\n"
    )
    (folder / "mem_banks/0/properties").write_text(f"heap_type 1\nsize_in_bytes {size}\nflags 0\n")


def machine(
    root: Path, *gpus: tuple[str, int, int, int, int], torch: TorchBuild | None = ROCM, **changes: Any
) -> Machine:
    node(root, 0, None)
    for number, gpu in enumerate(gpus, start=1):
        node(root, number, gpu)
    (root / "dev").mkdir()
    (root / "dev/kfd").touch()
    environment = changes.pop("environment", {})
    settings: dict[str, Any] = {"can_open": lambda path: True, "version": lambda name: None, **changes}
    return Machine(root=root, environment=environment, torch=lambda: torch, **settings)


def test_devices_are_found_and_processors_are_not(tmp_path: Path) -> None:
    here = machine(tmp_path, MI300X, W7900)
    found = probe.probe(here)
    assert not isinstance(found, str)
    assert [(d.name, d.description, d.memory_bytes >> 30) for d in found] == [
        ("rocm:0", "gfx942, gfx942, without amd-aiter", 192),
        ("rocm:1", "navi31, gfx1100, without amd-aiter", 48),
    ]
    assert [(gpu.wave_size, gpu.lds_bytes) for gpu in probe.read_gpus(tmp_path)] == [(64, 65536), (32, 65536)]
    assert probe.diagnose(here) == ()


def test_nodes_are_sorted_by_number(tmp_path: Path) -> None:
    for number in (2, 10):
        node(tmp_path, number, (f"n{number}", 90402, number, 2**30, 64))
    assert [gpu.name for gpu in probe.read_gpus(tmp_path)] == ["n2", "n10"]


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (90010, "gfx90a"), (90402, "gfx942"), (90500, "gfx950"), (110000, "gfx1100"), (120001, "gfx1201"),
        (100306, "gfx1036"),
    ],
)  # fmt: skip
def test_names_of_architectures(number: int, name: str) -> None:
    assert arch_of(number) == name


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"HIP_VISIBLE_DEVICES": "1"}, ["navi31"]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-000000000000bb22,0"}, ["navi31", "gfx942"]),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, ["navi31"]),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ["gfx942"]),
        ({"HIP_VISIBLE_DEVICES": "1", "CUDA_VISIBLE_DEVICES": "0"}, ["navi31"]),
    ],
)
def test_the_variables_choose_and_order(tmp_path: Path, environment: dict[str, str], names: list[str]) -> None:
    found = probe.probe(machine(tmp_path, MI300X, W7900, environment=environment))
    assert not isinstance(found, str)
    assert [d.description.split(",")[0] for d in found] == names


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "1"},
            "HIP_VISIBLE_DEVICES is '1', which hides all devices (1 device is there, and '1' is none of them)",
        ),
        ({"ROCR_VISIBLE_DEVICES": ""}, "ROCR_VISIBLE_DEVICES is empty, which hides all devices (2 devices are there)"),
    ],
)
def test_hidden_devices_are_no_devices(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    found = probe.probe(machine(tmp_path, MI300X, W7900, environment=environment))
    assert isinstance(found, str)
    assert reason in found


def test_without_a_driver(tmp_path: Path) -> None:
    here = Machine(root=tmp_path, environment={}, torch=lambda: ROCM)
    assert probe.probe(here) == "no AMD driver: there is no /sys/class/kfd/kfd/topology/nodes"
    assert probe.diagnose(here) == ()


def test_a_driver_without_a_device_that_computes(tmp_path: Path) -> None:
    found = probe.probe(machine(tmp_path))
    assert found == "the amdgpu driver is loaded, but has no device that computes (/sys/class/kfd/kfd/topology/nodes)"


def test_rights_that_are_missing(tmp_path: Path) -> None:
    here = machine(tmp_path, MI300X, can_open=lambda path: False)
    reason = "/dev/kfd may not be opened; add this user to the groups render and video"
    assert probe.probe(here) == reason
    assert probe.diagnose(here) == (f"there is gfx942 (gfx942), but {reason}",)


def test_a_container_without_the_device(tmp_path: Path) -> None:
    here = machine(tmp_path, MI300X)
    (tmp_path / "dev/kfd").unlink()
    assert "there is no /dev/kfd; in a container, give it with --device=/dev/kfd" in str(probe.probe(here))


def test_a_cpu_build_of_torch(tmp_path: Path) -> None:
    here = machine(tmp_path, MI300X, torch=TorchBuild(version="2.13.0+cpu"))
    reason = "there is gfx942 (gfx942), but torch 2.13.0+cpu is a CPU build; install PyTorch's ROCm build (its web site"
    assert str(probe.probe(here)).startswith(reason)
    assert probe.diagnose(here)[0].startswith(reason)


def test_what_changes_the_architecture_is_a_complaint(tmp_path: Path) -> None:
    here = machine(tmp_path, W7900, environment={"HSA_OVERRIDE_GFX_VERSION": "9.4.2", "HIP_VISIBLE_DEVICES": "0,x"})
    assert probe.diagnose(here) == (
        "HIP_VISIBLE_DEVICES is '0,x': 'x' names no device, so it and what follows are ignored",
        "HSA_OVERRIDE_GFX_VERSION is '9.4.2': kernels are built for a device that this one is not; unset it",
    )
