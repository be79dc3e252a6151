"""The shared attention kernels as a device takes them, with the formats of its cache."""

from collections.abc import Callable

from fairlead.interface import AttentionBackend, AttentionShape
from fairlead_triton.attention.backend import BLOCK_SIZES, TritonAttention
from fairlead_triton.attention.tiles import DeviceTraits, tuned
from fairlead_triton.device.allocator import DeviceAllocator
from fairlead_triton.device.runtime import Runtime

KV_FORMATS = {"auto": "auto", "float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
"""Names of the kernels' formats by Capabilities.kv_dtypes. They are stored as OCP bits on every device; the kernels
convert them in software where it has no instruction for them."""
TRITON_BLOCK_SIZES = BLOCK_SIZES
MakeBackend = Callable[[AttentionShape], AttentionBackend]


def triton_attention(
    runtime: Runtime, allocator: DeviceAllocator, traits: DeviceTraits, tuning_key: str
) -> MakeBackend:
    """Makes TritonAttention for a shape, in the tiles of the tuning table's device."""
    tuning = tuned(tuning_key)

    def make(shape: AttentionShape) -> AttentionBackend:
        kv_dtype = "auto" if shape.kv_dtype == shape.dtype else KV_FORMATS.get(shape.kv_dtype, shape.kv_dtype)
        return TritonAttention(shape, allocator, runtime.torch_device, kv_dtype=kv_dtype, traits=traits, tuning=tuning)

    return make
