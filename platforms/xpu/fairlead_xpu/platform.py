"""An Intel GPU as a Platform."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fairlead.interface import Device, OpProvider
from fairlead_triton.attention.tiles import DeviceTraits
from fairlead_triton.device.libraries import (
    Load,
    TorchBuild,
    Version,
    installed_torch,
    installed_version,
    load_or_reason,
)
from fairlead_triton.device.platform import DevicePlatform
from fairlead_triton.device.runtime import Runtime
from fairlead_xpu.probe import ipex_reason

IPEX = "ipex"
_IPEX_MODULE = "intel_extension_for_pytorch.llm.functional"
_PER_SUBSLICE = 8  # vector engines of an Xe core


def xccl_group(store: Any, rank: int, world_size: int) -> Any:
    """A process group over oneCCL, as torch has it."""
    dist: Any = torch.distributed
    return dist.ProcessGroupXCCL(store, rank, world_size, dist.ProcessGroupXCCL.Options())


class XpuPlatform(DevicePlatform):
    """Triton's kernels and torch's; those of intel-extension-for-pytorch where it fits the installed torch."""

    name = torch_type = "xpu"
    library = "XCCL"
    make_group = staticmethod(xccl_group)

    def __init__(
        self,
        device: Device,
        runtime: Runtime,
        *,
        version: Version = installed_version,
        torch_build: Callable[[], TorchBuild | None] = installed_torch,
        load: Load = importlib.import_module,
    ) -> None:
        super().__init__(device, runtime)
        properties = runtime.module.get_device_properties(runtime.index)
        self.use_kernels(
            "xpu",
            DeviceTraits(
                shared_memory_bytes=getattr(properties, "local_mem_size", 64 * 1024),
                num_processors=max(getattr(properties, "gpu_eu_count", 64 * _PER_SUBSLICE) // _PER_SUBSLICE, 1),
            ),
        )
        self.ipex_reason = self._add_ipex(version, torch_build(), load)
        has_float16 = bool(getattr(properties, "has_fp16", True))
        self.describe(("bfloat16", "float16", "float32") if has_float16 else ("bfloat16", "float32"))

    def _add_ipex(self, version: Version, build: TorchBuild | None, load: Load) -> str | None:
        """Puts its kernels in, after Triton's; returns why not where they are not."""
        reason = ipex_reason(version, build)
        if reason is not None:
            return reason
        functional, reason = load_or_reason(load, _IPEX_MODULE)
        if reason:
            return f"it {reason}"
        self.providers = _with_ipex(self.providers, functional)
        return None


def _with_ipex(providers: Mapping[str, tuple[OpProvider, ...]], functional: Any) -> dict[str, tuple[OpProvider, ...]]:
    def silu_and_mul(x_N2F: torch.Tensor) -> torch.Tensor:
        gate, up = x_N2F.chunk(2, dim=-1)
        out: torch.Tensor = functional.silu_mul(gate.contiguous(), up.contiguous())
        return out

    def rms_norm(x_NE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        out: torch.Tensor = functional.rms_norm(x_NE, weight_E, eps)
        return out

    found = dict(providers)
    for op, fn in (("rms_norm", rms_norm), ("silu_and_mul", silu_and_mul)):
        found[op] = (*found.get(op, ()), OpProvider(name=IPEX, fn=fn, priority=5))
    return found
