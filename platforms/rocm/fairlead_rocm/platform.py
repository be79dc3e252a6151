"""An AMD device as a Platform. In torch it is called "cuda", and its graphs and collectives bear CUDA's names."""

import importlib
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fairlead.interface import AttentionBackend, AttentionShape, Device, OpProvider
from fairlead_triton.attention.tiles import DeviceTraits
from fairlead_triton.device.libraries import Load, Version, installed_version, load_or_reason
from fairlead_triton.device.platform import DevicePlatform, nccl_group
from fairlead_triton.device.runtime import Runtime
from fairlead_triton.device.varlen import VarlenAttention

AITER = "aiter"
_AITER_BLOCK = 128
_AITER_ARCHS = ("gfx942", "gfx950")  # those that its own kernels are written for


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """What an architecture can do, by its name: no list of cards, so that one of tomorrow works as its family does.

    `matrix_fp8` is the 8-bit format of its matrix instructions: with one zero and no infinities of its own ("fnuz",
    on gfx940 to gfx942), as the open standard has it ("fn", later ones), or None.
    """

    name: str
    wave_size: int
    has_bfloat16: bool
    matrix_fp8: torch.dtype | None

    @classmethod
    def of(cls, name: str, wave_size: int) -> "Arch":
        """`name` as torch tells it, features included: "gfx942:sramecc+:xnack-"."""
        base = name.partition(":")[0]
        found = re.fullmatch(r"gfx(\d+)([0-9a-f])([0-9a-f])", base)
        major, minor, step = (int(found[1]), int(found[2], 16), int(found[3], 16)) if found else (0, 0, 0)
        fp8: torch.dtype | None = None
        if (major, minor) == (9, 4):
            fp8 = torch.float8_e4m3fnuz
        elif (major, minor) == (9, 5) or major >= 12:
            fp8 = torch.float8_e4m3fn
        has_bfloat16 = major >= 11 or (major, minor) >= (9, 4) or (major, minor, step) == (9, 0, 10)
        if major == 10:
            has_bfloat16 = False
        return cls(name=base, wave_size=wave_size, has_bfloat16=has_bfloat16, matrix_fp8=fp8)


class RocmPlatform(DevicePlatform):
    """Triton's kernels and torch's; AITER's where it is installed and has kernels for the device."""

    name, library = "rocm", "RCCL"
    make_group = staticmethod(nccl_group)

    def __init__(
        self,
        device: Device,
        runtime: Runtime,
        *,
        version: Version = installed_version,
        load: Load = importlib.import_module,
    ) -> None:
        super().__init__(device, runtime)
        properties = runtime.module.get_device_properties(runtime.index)
        self.arch = Arch.of(properties.gcnArchName, getattr(properties, "warp_size", 64))
        # What a work-group shares lies in LDS; tiles are chosen to fit, and wide waves to be filled.
        self.use_kernels(
            self.arch.name,
            DeviceTraits(
                shared_memory_bytes=getattr(properties, "shared_memory_per_block", 64 * 1024),
                num_processors=getattr(properties, "multi_processor_count", 64),
                warp_size=self.arch.wave_size,
                native_fp8=self.arch.matrix_fp8 is torch.float8_e4m3fn,
            ),
        )
        self._add_aiter(version, load)
        self.describe(("bfloat16", "float16", "float32") if self.arch.has_bfloat16 else ("float16", "float32"))

    def _add_aiter(self, version: Version, load: Load) -> None:
        """Attention and norms of AMD's own library; or why not."""
        distribution = next((name for name in ("amd-aiter", "aiter") if version(name) is not None), None)
        if distribution is None:
            self.unavailable[AITER] = "the package 'amd-aiter' is not installed"
            return
        if self.arch.name not in _AITER_ARCHS:
            known = ", ".join(_AITER_ARCHS)
            self.unavailable[AITER] = f"{distribution} has kernels for {known}, not for {self.arch.name}"
            return
        library, reason = load_or_reason(load, AITER)
        if reason:
            self.unavailable[AITER] = f"{distribution} {version(distribution)} {reason}"
            return
        self.backends[AITER] = partial(self._aiter_attention, library)
        norm = OpProvider(name=AITER, fn=library.rms_norm, priority=5, refuses=_not_16_bits)
        self.providers = {**self.providers, "rms_norm": (*self.providers.get("rms_norm", ()), norm)}

    def _aiter_attention(self, library: Any, shape: AttentionShape) -> AttentionBackend:
        varlen = library.flash_attn_varlen_func
        return VarlenAttention(AITER, varlen, shape, self.allocator, self.torch_device, block_multiple=_AITER_BLOCK)


def _not_16_bits(dtype: str) -> str | None:
    return None if dtype in ("bfloat16", "float16") else f"AITER's norm has no {dtype}"
