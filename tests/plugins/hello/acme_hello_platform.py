"""The hello accelerator: what its device is, and references for all the rest."""

import torch

from fairlead.interface import MemoryInfo
from fairlead.ops.platform import BasicPlatform


class HelloPlatform(BasicPlatform):
    """Host memory under another name, all of it through the references."""

    name = "hello"
    torch_device = torch.device("cpu")

    def memory_info(self) -> MemoryInfo:
        """What the device has, less what its pools hold."""
        held = self.allocator.allocated_bytes("weights") + self.allocator.allocated_bytes("kv_cache")
        total = self.device.memory_bytes
        return MemoryInfo(total_bytes=total, free_bytes=max(total - held, 0))
