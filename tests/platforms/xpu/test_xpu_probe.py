"""Discovery of Intel's GPUs, with the kernel's tree as data."""

from pathlib import Path
from typing import Any

import pytest

from fairlead_triton.device.libraries import TorchBuild
from fairlead_xpu import probe
from fairlead_xpu.probe import Machine

XPU = TorchBuild(version="2.13.0+xpu", xpu="20250302")
CPU = TorchBuild(version="2.13.0+cpu")
GIB = 2**30


def card(
    root: Path, number: int, *, vendor: str = "0x8086", driver: str = "xe", kind: str = "0x030000", memory: int = 0
) -> None:
    """One card; its memory is that of its largest prefetchable window, or the host's if there is none."""
    address = f"0000:{number:02x}:00.0"
    device = root / "sys/devices" / address
    (device / f"drm/renderD{128 + number}").mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "device").write_text("0xe20b\n")
    (device / "class").write_text(f"{kind}\n")
    window = f"0x0000004000000000 {0x4000000000 + memory - 1:#018x} 0x000000000014220c\n" if memory else ""
    (device / "resource").write_text(f"0x00000000a0000000 0x00000000a0ffffff 0x0000000000140204\n{window}")
    (root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
    (device / "driver").symlink_to(root / "sys/bus/pci/drivers" / driver)
    folder = root / f"sys/class/drm/card{number}"
    folder.mkdir(parents=True)
    (folder / "device").symlink_to(device)
    (root / "dev/dri").mkdir(parents=True, exist_ok=True)
    (root / f"dev/dri/renderD{128 + number}").touch()


def machine(root: Path, *, torch: TorchBuild | None = XPU, **changes: Any) -> Machine:
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text("MemTotal:       33554432 kB\n")
    settings: dict[str, Any] = {
        "environment": {},
        "load": lambda name: object(),
        "version": lambda name: None,
        "can_open": lambda path: True,
        **changes,
    }
    return Machine(root=root, torch=lambda: torch, **settings)


def no_library(name: str) -> Any:
    raise OSError(name)


def test_devices_are_found_by_address_and_others_are_not(tmp_path: Path) -> None:
    card(tmp_path, 3, memory=16 * GIB)
    card(tmp_path, 1, driver="i915")
    card(tmp_path, 2, vendor="0x10de")
    card(tmp_path, 4, driver="vfio-pci")
    (tmp_path / "sys/class/drm/card1-DP-1").mkdir()
    found = probe.probe(machine(tmp_path))
    assert not isinstance(found, str)
    assert [(d.name, d.description.split("; ")[0], d.memory_bytes // GIB) for d in found] == [
        ("xpu:0", "Intel GPU e20b at 0000:01:00.0, driver i915", 32),  # in the host's memory
        ("xpu:1", "Intel GPU e20b at 0000:03:00.0, driver xe", 16),
    ]


@pytest.mark.parametrize(
    ("mask", "addresses"), [("1", ["02"]), ("1,0", ["02", "01"]), ("0.1,0.0", ["01"]), ("0,9", ["01"])]
)
def test_the_mask_chooses_devices_and_tiles(tmp_path: Path, mask: str, addresses: list[str]) -> None:
    for number in (1, 2):
        card(tmp_path, number, memory=16 * GIB)
    found = probe.probe(machine(tmp_path, environment={"ZE_AFFINITY_MASK": mask}))
    assert not isinstance(found, str)
    assert [d.description.split("0000:")[1][:2] for d in found] == addresses


def test_a_mask_that_hides_all(tmp_path: Path) -> None:
    card(tmp_path, 1, memory=16 * GIB)
    found = probe.probe(machine(tmp_path, environment={"ZE_AFFINITY_MASK": "3"}))
    assert found == (
        "ZE_AFFINITY_MASK is '3', which hides all devices (1 device is there, and '3' is none of them); unset it, or "
        "name devices by number"
    )


def test_without_a_device(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert probe.probe(here) == "no Intel GPU: no card under /sys/class/drm is Intel's with the driver i915 or xe"
    assert probe.diagnose(here) == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"load": no_library},
            "there is 1 Intel GPU, but libze_loader.so.1 is not found; install the level-zero loader",
        ),
        ({"can_open": lambda path: False}, "there is 1 Intel GPU, but /dev/dri/renderD129 may not be opened; add this"),
        ({"torch": CPU}, "there is 1 Intel GPU, but torch 2.13.0+cpu is a CPU build; install PyTorch's XPU build"),
        ({"torch": None}, "there is 1 Intel GPU, but torch is not installed; install PyTorch's XPU build"),
    ],
    ids=["loader", "rights", "cpu torch", "no torch"],
)
def test_what_is_missing_is_said(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    card(tmp_path, 1, memory=16 * GIB)
    here = machine(tmp_path, **changes)
    assert str(probe.probe(here)).startswith(reason)
    assert [text.startswith(reason) for text in probe.diagnose(here)] == [True]


def test_a_container_without_the_nodes(tmp_path: Path) -> None:
    card(tmp_path, 1, memory=16 * GIB)
    (tmp_path / "dev/dri/renderD129").unlink()
    found = probe.probe(machine(tmp_path))
    assert found == "there is 1 Intel GPU, but no /dev/dri/renderD*; in a container, give it with --device=/dev/dri"


@pytest.mark.parametrize(
    ("own", "torch", "reason"),
    [
        (None, XPU, "intel-extension-for-pytorch is not installed (pip install 'fairlead-xpu[ipex]', for torch 2.8)"),
        (
            "2.8.10+xpu",
            XPU,
            "intel-extension-for-pytorch 2.8.10+xpu needs torch 2.8, found 2.13.0+xpu; 2.8 is its last release",
        ),
        ("2.8.10+xpu", TorchBuild(version="2.8.0+xpu", xpu="20250101"), None),
    ],
)
def test_the_extension_needs_the_torch_of_its_version(
    tmp_path: Path, own: str | None, torch: TorchBuild, reason: str | None
) -> None:
    assert probe.ipex_reason(lambda name: own, torch) == reason
    here = machine(tmp_path, torch=torch, version=lambda name: own)
    card(tmp_path, 1, memory=16 * GIB)
    [device] = probe.probe(here)
    told = "with intel-extension-for-pytorch" if reason is None else f"IPEX is not used: {reason}"
    assert str(device.description).partition("; ")[2] == told
    expected = () if own is None or reason is None else (f"{probe.IPEX} is installed, but is not used: {reason}",)
    assert probe.diagnose(here) == expected
