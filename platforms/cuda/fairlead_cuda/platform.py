"""An NVIDIA device as a Platform."""

import importlib
from functools import partial
from typing import Any

from fairlead.interface import AttentionBackend, AttentionShape, Device
from fairlead_cuda.flashinfer import NAME as FLASHINFER
from fairlead_cuda.flashinfer import FlashInferAttention
from fairlead_triton.attention.tiles import DeviceTraits
from fairlead_triton.device.kernels import TRITON_BLOCK_SIZES
from fairlead_triton.device.libraries import Load, Version, installed_version, load_or_reason
from fairlead_triton.device.platform import DevicePlatform, nccl_group
from fairlead_triton.device.runtime import Runtime
from fairlead_triton.device.varlen import VarlenAttention

FLASH_ATTN = "flash_attn"
_FLASH_ATTN_BLOCK = 256  # tokens: of a paged cache it takes multiples of this alone
_FIRST_FLASH = (8, 0)  # compute capability: Ampere; neither library has kernels for older ones
_FIRST_FP8 = (8, 9)


class CudaPlatform(DevicePlatform):
    """Triton's kernels and torch's; attention through FlashInfer and flash-attn where these are installed."""

    name, library = "cuda", "NCCL"
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
        self.capability = (properties.major, properties.minor)
        self.use_kernels(
            "sm_" + "".join(map(str, self.capability)),
            DeviceTraits(
                shared_memory_bytes=getattr(properties, "shared_memory_per_block_optin", 64 * 1024),
                num_processors=getattr(properties, "multi_processor_count", 64),
                async_copies=self.capability >= _FIRST_FLASH,
                native_fp8=self.capability >= _FIRST_FP8,
            ),
        )
        self._add_libraries(version, load)
        has_bfloat16 = self.capability >= (8, 0)
        dtypes = ("bfloat16", "float16", "float32") if has_bfloat16 else ("float16", "float32")
        extra = (_FLASH_ATTN_BLOCK,) if FLASH_ATTN in self.backends else ()
        self.describe(dtypes, (*TRITON_BLOCK_SIZES, *extra))

    def _add_libraries(self, version: Version, load: Load) -> None:
        """Puts in the attention libraries that are installed and fit; says of the others why not."""
        for name, distribution, make in (
            (FLASHINFER, "flashinfer-python", self._flashinfer),
            (FLASH_ATTN, "flash-attn", self._flash_attn),
        ):
            if version(distribution) is None:
                self.unavailable[name] = f"the package {distribution!r} is not installed"
            elif self.capability < _FIRST_FLASH:
                self.unavailable[name] = f"{distribution} needs compute capability 8.0, this device has {self._dotted}"
            else:
                library, reason = load_or_reason(load, name)
                if reason:
                    self.unavailable[name] = f"{distribution} {version(distribution)} {reason}"
                else:
                    self.backends[name] = partial(make, library)

    @property
    def _dotted(self) -> str:
        return ".".join(map(str, self.capability))

    def _flashinfer(self, library: Any, shape: AttentionShape) -> AttentionBackend:
        return FlashInferAttention(shape, self.allocator, self.torch_device, library)

    def _flash_attn(self, library: Any, shape: AttentionShape) -> AttentionBackend:
        varlen = library.flash_attn_varlen_func
        return VarlenAttention(
            FLASH_ATTN, varlen, shape, self.allocator, self.torch_device, block_multiple=_FLASH_ATTN_BLOCK
        )
