"""The CPU as a Platform."""

from collections.abc import Callable, Mapping

import torch

from fairlead.interface import (
    AttentionBackend,
    AttentionShape,
    Capabilities,
    Defaults,
    Device,
    GraphRunner,
    LinearMethod,
    MemoryAllocator,
    MemoryInfo,
    MemoryProfile,
    OpProvider,
)
from fairlead.ops.attention import ReferenceAttention
from fairlead.ops.platform import BasicPlatform
from fairlead_cpu import memory, memory_profile, native
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.attention import SdpaAttention
from fairlead_cpu.linear import linear_methods
from fairlead_cpu.native_attention import KV_DTYPES, NativeAttention
from fairlead_cpu.ops import providers
from fairlead_cpu.recorder import StepRecorder


class CpuPlatform(BasicPlatform):
    """Host memory, native kernels where the package was built with them, and torch's."""

    name = "cpu"

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.torch_device = torch.device("cpu")
        self._host = HostAllocator()
        self.allocator: MemoryAllocator = self._host
        self._kernels = native.kernels()
        self.capabilities = Capabilities(
            dtypes=("bfloat16", "float32"),
            block_sizes=(16, 8, 32, 64, 128, 1, 2, 4),
            kv_layouts=("slots",) if self._kernels is None else ("segments", "slots"),
            kv_dtypes=("auto",) if self._kernels is None else KV_DTYPES,
            quantization=() if self._kernels is None else ("int8", "int4"),
            batch_invariant=self._kernels is not None,
        )
        self.defaults = Defaults(
            dtype="bfloat16", block_size=16, max_num_batched_tokens=2048, device_memory_utilization=0.5
        )

    def attention_backends(self) -> tuple[str, ...]:
        """`native` where the package was built with kernels; `sdpa` groups sequences of like length for torch's fused
        attention; `reference` is the oracle."""
        native_names = () if self._kernels is None else (NativeAttention.name,)
        return (*native_names, SdpaAttention.name, ReferenceAttention.name)

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        """Makes the backend."""
        if name == NativeAttention.name and self._kernels is not None:
            return NativeAttention(shape, self.allocator, self._kernels)
        if name == SdpaAttention.name:
            return SdpaAttention(shape, self.allocator)
        return super().attention(name, shape)

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        """Native kernels, then torch's own fused ones."""
        return providers(self._kernels)

    def linear_methods(self) -> Mapping[str, tuple[LinearMethod, ...]]:
        """Native kernels for every scheme, if the package was built with any."""
        return {} if self._kernels is None else linear_methods(self._kernels, self.allocator)

    def graph_runner(self) -> GraphRunner:
        """Steps of few rows are recorded and replayed, where there are native kernels to record."""
        if self._kernels is None:
            return super().graph_runner()
        return StepRecorder(self._kernels, lambda: self._host.num_restores)

    def memory_info(self) -> MemoryInfo:
        """The host's memory, or the control group's."""
        return memory.info()

    def memory_profile(self, work: Callable[[], None]) -> MemoryProfile | None:
        """By this process's own account with the system."""
        return memory_profile.profile(work)

    def max_swap_bytes(self, device_bytes: int) -> int | None:
        """The device computes in the memory of the host: what it leaves of that."""
        return max(self.memory_info().free_bytes - device_bytes, 0)
