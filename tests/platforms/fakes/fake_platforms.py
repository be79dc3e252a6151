"""The platforms' own classes on fake devices, whatever device of theirs it should be."""

from typing import Any

from fake_device import FakeModule, fake_runtime

from fairlead.interface import Device
from fairlead_cuda.platform import CudaPlatform
from fairlead_rocm.platform import RocmPlatform
from fairlead_triton.device.libraries import TorchBuild
from fairlead_triton.device.platform import DevicePlatform
from fairlead_xpu.platform import XpuPlatform

GIB = 2**30
PROPERTIES: dict[str, dict[str, Any]] = {
    "cuda": {"multi_processor_count": 132, "shared_memory_per_block_optin": 232448},
    "rocm": {"multi_processor_count": 304, "gcnArchName": "gfx942:sramecc+:xnack-", "warp_size": 64},
    "xpu": {"gpu_eu_count": 160, "has_fp16": True},
}
XPU_28 = TorchBuild(version="2.8.0+xpu", xpu="20250101")


def nothing(distribution: str) -> str | None:
    """No optional library is installed."""
    return None


def make(
    name: str, device: Device | None = None, *, module: FakeModule | None = None, graphs: bool = True, **options: Any
) -> DevicePlatform:
    """The platform `name`; `options` go to its constructor."""
    module = module or FakeModule(total_bytes=4 * GIB)
    module.properties = {**PROPERTIES[name], **module.properties}
    device = device or Device(name=f"{name}:0", description="a fake device", memory_bytes=module.total_bytes)
    kinds: dict[str, type[DevicePlatform]] = {"cuda": CudaPlatform, "rocm": RocmPlatform, "xpu": XpuPlatform}
    options = {"version": nothing, **options}
    kind: Any = kinds[name]
    made: DevicePlatform = kind(device, fake_runtime(module, graphs=graphs), **options)
    return made
