"""Discovery of NVIDIA's devices, with the driver's library as data."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fairlead_cuda import probe
from fairlead_cuda.probe import Machine
from fairlead_triton.device.libraries import TorchBuild

CUDA_13 = TorchBuild(version="2.13.0+cu130", cuda="13.0")
CPU = TorchBuild(version="2.13.0+cpu")
WITHOUT = "without flashinfer-python and flash-attn"
H200 = ("NVIDIA H200", "GPU-aa11", 150_000, (9, 0))
L4 = ("NVIDIA L4", "GPU-bb22", 24_000, (8, 9))
V100 = ("Tesla V100", "GPU-cc33", 16_000, (7, 0))
MIG = ("NVIDIA H200 MIG 1g.18gb", "MIG-dd44", 18_000, (9, 0))


class ErrorString:
    restype: Any = None

    def __call__(self, status: Any) -> bytes:
        return b"Driver/library version mismatch"


@dataclass
class FakeNvml:
    """The functions of libnvidia-ml over rows of data: name, unique name, bytes, compute capability."""

    gpus: tuple[tuple[str, str, int, tuple[int, int]], ...] = (H200,)
    driver: str = "580.65.06"
    cuda: int = 13000
    init_status: int = 0
    num_open: int = 0
    nvmlErrorString = ErrorString()

    def __call__(self, name: str) -> "FakeNvml":
        assert name == "libnvidia-ml.so.1"
        return self

    def nvmlInit_v2(self) -> int:
        self.num_open += 1
        return self.init_status

    def nvmlShutdown(self) -> int:
        self.num_open -= 1
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, out: Any) -> int:
        out._obj.value = self.cuda
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, size: Any) -> int:
        buffer.value = self.driver.encode()
        return 0

    def nvmlDeviceGetCount_v2(self, out: Any) -> int:
        out._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, out: Any) -> int:
        out._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, out: Any) -> int:
        if uuid.value.decode() != MIG[1]:
            return 6
        out._obj.value = 99
        return 0

    def _row(self, handle: Any) -> tuple[str, str, int, tuple[int, int]]:
        return MIG if handle.value == 99 else self.gpus[handle.value - 1]

    def nvmlDeviceGetMemoryInfo(self, handle: Any, out: Any) -> int:
        out._obj.total = self._row(handle)[2]
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = self._row(handle)[3]
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: Any) -> int:
        buffer.value = self._row(handle)[0].encode()
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, size: Any) -> int:
        buffer.value = self._row(handle)[1].encode()
        return 0


def no_library(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


def machine(tmp_path: Path, nvml: Any = None, *, torch: TorchBuild | None = CUDA_13, **environment: str) -> Machine:
    return Machine(
        root=tmp_path,
        environment=environment,
        load=nvml or FakeNvml(),
        torch=lambda: torch,
        version=lambda name: None,
    )


def test_devices_are_found_and_the_driver_is_let_go(tmp_path: Path) -> None:
    nvml = FakeNvml(gpus=(H200, L4))
    found = probe.probe(machine(tmp_path, nvml))
    assert not isinstance(found, str)
    assert [(d.name, d.memory_bytes) for d in found] == [("cuda:0", 150_000), ("cuda:1", 24_000)]
    assert found[1].description == "NVIDIA L4, compute capability 8.9, driver 580.65.06, " + WITHOUT
    assert nvml.num_open == 0


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("1", ["NVIDIA L4"]),
        ("1,0", ["NVIDIA L4", "NVIDIA H200"]),
        ("GPU-bb", ["NVIDIA L4"]),
        ("0,7,1", ["NVIDIA H200"]),  # as CUDA does: what follows a wrong one is ignored
        ("MIG-dd44", ["NVIDIA H200 MIG 1g.18gb"]),
    ],
)
def test_the_variable_chooses_and_orders(tmp_path: Path, value: str, names: list[str]) -> None:
    found = probe.probe(machine(tmp_path, FakeNvml(gpus=(H200, L4)), CUDA_VISIBLE_DEVICES=value))
    assert not isinstance(found, str)
    assert [d.description.split(",")[0] for d in found] == names
    assert [d.name for d in found] == [f"cuda:{i}" for i in range(len(names))]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "CUDA_VISIBLE_DEVICES is empty, which hides all devices (2 devices are there); unset it, or name devices"),
        ("-1", "CUDA_VISIBLE_DEVICES is '-1', which hides all devices (2 devices are there); unset it"),
        ("5", "CUDA_VISIBLE_DEVICES is '5', which hides all devices (2 devices are there, and '5' is none of them)"),
        ("GPU-", "is 'GPU-', which hides all devices (2 devices are there, and 'GPU-' is none of them)"),
        ("MIG-zz", "is 'MIG-zz', but nvmlDeviceGetHandleByUUID failed: Driver/library version mismatch (6)"),
    ],
)
def test_hidden_devices_are_no_devices(tmp_path: Path, value: str, reason: str) -> None:
    found = probe.probe(machine(tmp_path, FakeNvml(gpus=(H200, L4)), CUDA_VISIBLE_DEVICES=value))
    assert isinstance(found, str)
    assert reason in found


def test_optional_libraries_are_told(tmp_path: Path) -> None:
    here = dataclasses.replace(machine(tmp_path), version={"flash-attn": "2.8.3"}.get)
    [device] = probe.probe(here)
    assert str(device.description).endswith("driver 580.65.06, with flash-attn 2.8.3, without flashinfer-python")


def test_without_a_driver(tmp_path: Path) -> None:
    here = machine(tmp_path, no_library)
    assert probe.probe(here) == "no NVIDIA driver: libnvidia-ml.so.1 is not found"
    assert probe.diagnose(here) == ()  # a machine without a device is a healthy one


def test_a_container_without_the_drivers_libraries(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version: 580")
    here = machine(tmp_path, no_library)
    reason = (
        "the NVIDIA kernel driver is loaded, but libnvidia-ml.so.1 is not found; in a container, start it with the "
        "NVIDIA container toolkit (--gpus all), else install the driver's libraries of the same version"
    )
    assert probe.probe(here) == reason
    assert probe.diagnose(here) == (reason,)


def test_a_driver_that_fails_says_so(tmp_path: Path) -> None:
    found = probe.probe(machine(tmp_path, FakeNvml(init_status=18)))
    assert found == "no NVIDIA driver: nvmlInit_v2 failed: Driver/library version mismatch (18)"


def test_a_cpu_build_of_torch(tmp_path: Path) -> None:
    here = machine(tmp_path, torch=CPU)
    reason = (
        "driver 580.65.06 has 1 device, but torch 2.13.0+cpu is a CPU build; install PyTorch's CUDA build (its web "
        "site shows the command under Get Started)"
    )
    assert probe.probe(here) == reason
    assert probe.diagnose(here) == (reason,)
    assert "but torch is not installed; install PyTorch's CUDA build" in str(probe.probe(machine(tmp_path, torch=None)))


def test_a_build_for_another_maker(tmp_path: Path) -> None:
    found = probe.probe(machine(tmp_path, torch=TorchBuild(version="2.13.0+rocm7.1", hip="7.1.2")))
    assert "but torch 2.13.0+rocm7.1 is a ROCm 7.1.2 build; install PyTorch's CUDA build" in str(found)


def test_a_driver_that_is_too_old_names_both_versions_and_the_remedy(tmp_path: Path) -> None:
    here = machine(tmp_path, FakeNvml(driver="535.104.05", cuda=12020))
    reason = (
        "driver 535.104.05 has 1 device, but it runs CUDA up to 12.2, and torch 2.13.0+cu130 was built for 13.0: "
        "update the driver to 580 or newer, or install a torch that was built for CUDA 12"
    )
    assert probe.probe(here) == reason
    assert probe.diagnose(here) == (reason,)


def test_a_minor_version_apart_runs(tmp_path: Path) -> None:
    build = TorchBuild(version="2.11.0+cu128", cuda="12.8")
    assert not isinstance(probe.probe(machine(tmp_path, FakeNvml(cuda=12020), torch=build)), str)


def test_a_device_that_is_too_old(tmp_path: Path) -> None:
    found = probe.probe(machine(tmp_path, FakeNvml(gpus=(V100,))))
    assert found == "compute capability 7.5 or newer is needed, found: Tesla V100 (7.0)"
    both = machine(tmp_path, FakeNvml(gpus=(V100, L4)))
    devices = probe.probe(both)
    assert [d.name for d in devices if not isinstance(d, str)] == ["cuda:1"]  # as torch numbers it
    assert probe.diagnose(both) == ("device 0 (Tesla V100) has compute capability 7.0; 7.5 is the least",)


def test_a_wrong_entry_is_a_complaint(tmp_path: Path) -> None:
    here = machine(tmp_path, FakeNvml(gpus=(H200, L4)), CUDA_VISIBLE_DEVICES="0,9,1")
    [complaint] = probe.diagnose(here)
    assert complaint == ("CUDA_VISIBLE_DEVICES is '0,9,1': '9' names no device, so it and what follows are ignored")


def test_a_driver_without_a_device(tmp_path: Path) -> None:
    assert probe.probe(machine(tmp_path, FakeNvml(gpus=()))) == "driver 580.65.06 finds no device"
