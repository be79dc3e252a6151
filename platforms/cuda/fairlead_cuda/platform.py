"""An NVIDIA device as a Platform."""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fairlead.interface import AttentionBackend, AttentionShape, Capabilities, Defaults, Device
from fairlead_cuda.flashinfer import NAME as FLASHINFER
from fairlead_cuda.flashinfer import FlashInferAttention
from fairlead_triton.attention.tiles import DeviceTraits
from fairlead_triton.device.kernels import KV_FORMATS, TRITON_BLOCK_SIZES, triton_attention
from fairlead_triton.device.libraries import Version, installed_version
from fairlead_triton.device.platform import DevicePlatform
from fairlead_triton.device.runtime import Runtime, torch_runtime
from fairlead_triton.device.varlen import VarlenAttention
from fairlead_triton.linear import linear_methods
from fairlead_triton.ops import providers

FLASH_ATTN = "flash_attn"
_FLASH_ATTN_BLOCK = 256  # tokens: of a paged cache it takes multiples of this alone
_FIRST_FLASH = (8, 0)  # compute capability: Ampere; neither library has kernels for older ones
_FIRST_FP8 = (8, 9)

Load = Callable[[str], Any]


class CudaPlatform(DevicePlatform):
    """Triton's kernels and torch's; attention through FlashInfer and flash-attn where these are installed."""

    name = "cuda"

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
        self.tuning_key = "sm_" + "".join(map(str, self.capability))
        self.traits = DeviceTraits(
            shared_memory_bytes=getattr(properties, "shared_memory_per_block_optin", 64 * 1024),
            num_processors=getattr(properties, "multi_processor_count", 64),
            async_copies=self.capability >= _FIRST_FLASH,
            native_fp8=self.capability >= _FIRST_FP8,
        )
        self.backends["triton"] = triton_attention(runtime, self.device_allocator, self.traits)
        self.providers = providers(self.tuning_key)
        self.methods = linear_methods(self.tuning_key, self.device_allocator)
        self._add_libraries(version, load)
        has_bfloat16 = self.capability >= (8, 0)
        block_sizes: tuple[int, ...] = TRITON_BLOCK_SIZES
        if FLASH_ATTN in self.backends:
            block_sizes = (*block_sizes, _FLASH_ATTN_BLOCK)
        self.library, self.make_group = "NCCL", nccl_group
        self.capabilities = Capabilities(
            dtypes=("bfloat16", "float16", "float32") if has_bfloat16 else ("float16", "float32"),
            block_sizes=block_sizes,
            kv_dtypes=tuple(KV_FORMATS),
            kv_layouts=("paged", "slots"),
            quantization=tuple(scheme for scheme in self.methods if scheme != "unquantized"),
            graphs=runtime.new_graph is not None,
            # The kernels are, but torch's matrix products choose theirs by the number of rows.
            batch_invariant=False,
            max_world_size=runtime.module.device_count(),
        )
        self.defaults = Defaults(
            dtype="bfloat16" if has_bfloat16 else "float16",
            block_size=16,
            max_num_batched_tokens=8192,
            device_memory_utilization=0.9,
            async_scheduling=True,
        )

    @classmethod
    def on(cls, device: Device) -> "CudaPlatform":
        """The real one: torch numbers devices as the probe does."""
        return cls(device, torch_runtime("cuda", int(device.name.partition(":")[2])))

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
                try:
                    library = load(name)
                except Exception as error:  # built for another torch, most often: whatever it raises is the reason
                    why = " ".join(str(error).split())
                    self.unavailable[name] = f"{distribution} {version(distribution)} cannot be imported: {why:.200}"
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


def nccl_group(store: Any, rank: int, world_size: int) -> Any:
    """A process group over NCCL (on ROCm: RCCL, under the same name)."""
    dist: Any = torch.distributed
    return dist.ProcessGroupNCCL(store, rank, world_size, dist.ProcessGroupNCCL.Options())
