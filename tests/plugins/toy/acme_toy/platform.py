"""The toy as a Platform."""

import torch
from fairlead.interface import Capabilities, Defaults, Device, MemoryInfo
from fairlead.ops.memory import PooledAllocator
from fairlead.ops.platform import BasicPlatform

from acme_toy.device import ToyTensor, register


class ToyPlatform(BasicPlatform):
    """A device with an odd block size."""

    name = "toy"
    capabilities = Capabilities(dtypes=("float32",), block_sizes=(12,), kv_layouts=("toy",))
    defaults = Defaults(dtype="float32", block_size=12, max_num_batched_tokens=256, device_memory_utilization=0.5)

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.torch_device = register()
        self.allocator = PooledAllocator(self.allocate, storage_of=lambda t: t._held.untyped_storage())

    def memory_info(self) -> MemoryInfo:
        """What its own pools have left."""
        total = self.device.memory_bytes
        used = self.allocator.allocated_bytes("weights") + self.allocator.allocated_bytes("kv_cache")
        return MemoryInfo(total_bytes=total, free_bytes=total - used)
