"""The CPU as a Platform."""

from collections.abc import Mapping

import torch

from fairlead.interface import (
    AttentionBackend,
    AttentionShape,
    Capabilities,
    Defaults,
    Device,
    MemoryAllocator,
    MemoryInfo,
    OpProvider,
)
from fairlead.ops.attention import ReferenceAttention
from fairlead.ops.platform import BasicPlatform
from fairlead_cpu import memory
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.attention import SdpaAttention
from fairlead_cpu.ops import PROVIDERS


class CpuPlatform(BasicPlatform):
    """Host memory and torch's CPU kernels, on all cores that torch was given."""

    name = "cpu"

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.torch_device = torch.device("cpu")
        self.allocator: MemoryAllocator = HostAllocator()
        self.capabilities = Capabilities(
            dtypes=("bfloat16", "float32"), block_sizes=(16, 8, 32, 64, 128, 1, 2, 4), batch_invariant=False
        )
        self.defaults = Defaults(
            dtype="bfloat16", block_size=16, max_num_batched_tokens=2048, device_memory_utilization=0.5
        )

    def attention_backends(self) -> tuple[str, ...]:
        """`sdpa` groups sequences of like length for torch's fused attention; `reference` is the oracle."""
        return (SdpaAttention.name, ReferenceAttention.name)

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        """Makes the backend."""
        if name == SdpaAttention.name:
            return SdpaAttention(shape, self.allocator)
        return super().attention(name, shape)

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        """Torch's own fused kernels where it has them; native kernels register here too."""
        return PROVIDERS

    def memory_info(self) -> MemoryInfo:
        """The host's memory, or the control group's."""
        return memory.info()
