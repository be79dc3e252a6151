"""The Platform that CUDA, ROCm and XPU have in common; each adds what its devices can do."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch

from fairlead.errors import ConfigError
from fairlead.interface import (
    AttentionBackend,
    AttentionShape,
    Capabilities,
    Communicator,
    Defaults,
    Device,
    GraphRunner,
    LinearMethod,
    MemoryInfo,
    MemoryProfile,
    OpProvider,
    Stream,
)
from fairlead.ops.attention import ReferenceAttention
from fairlead.ops.platform import BasicPlatform, SingleRank
from fairlead_triton.attention.tiles import DeviceTraits
from fairlead_triton.device import collectives, memory
from fairlead_triton.device.allocator import DeviceAllocator
from fairlead_triton.device.graph import GraphCapturer
from fairlead_triton.device.kernels import KV_FORMATS, TRITON_BLOCK_SIZES, MakeBackend, triton_attention
from fairlead_triton.device.runtime import Runtime, torch_runtime
from fairlead_triton.device.streams import DeviceStream
from fairlead_triton.linear import linear_methods
from fairlead_triton.ops import providers


class DevicePlatform(BasicPlatform):
    """Memory, streams, graphs and collectives of one device, and the parts that a subclass puts in.

    `backends` make attention by name, the preferred one first; `unavailable` says of others why they are not there.
    `make_group` makes a process group of `library`; `torch_type` is what torch calls such devices.
    """

    torch_type = "cuda"
    library = ""
    make_group: collectives.MakeGroup | None = None
    traits: DeviceTraits
    tuning_key: str

    def __init__(self, device: Device, runtime: Runtime) -> None:
        super().__init__(device)
        self.torch_device = runtime.torch_device
        self.runtime = runtime
        self.device_allocator = DeviceAllocator(runtime)
        self.allocator = self.device_allocator
        self.backends: dict[str, MakeBackend] = {}
        self.unavailable: dict[str, str] = {}
        self.providers: Mapping[str, tuple[OpProvider, ...]] = {}
        self.methods: Mapping[str, tuple[LinearMethod, ...]] = {}
        runtime.make_current()

    @classmethod
    def on(cls, device: Device) -> Self:
        """The real one: torch numbers devices as the probe does."""
        return cls(device, torch_runtime(cls.torch_type, int(device.name.partition(":")[2])))

    def use_kernels(self, tuning_key: str, traits: DeviceTraits) -> None:
        """Puts the shared kernels in, tuned for a device."""
        self.tuning_key, self.traits = tuning_key, traits
        self.backends["triton"] = triton_attention(self.runtime, self.device_allocator, traits, tuning_key)
        self.providers = providers(tuning_key)
        self.methods = linear_methods(tuning_key, self.device_allocator)

    def describe(self, dtypes: tuple[str, ...], block_sizes: tuple[int, ...] = TRITON_BLOCK_SIZES) -> None:
        """Says what the platform can do; the first dtype is the default."""
        self.capabilities = Capabilities(
            dtypes=dtypes,
            block_sizes=block_sizes,
            kv_dtypes=tuple(KV_FORMATS),
            kv_layouts=("paged", "slots"),
            quantization=tuple(scheme for scheme in self.methods if scheme != "unquantized"),
            graphs=self.runtime.new_graph is not None,
            # The kernels are, but torch's matrix products choose theirs by the number of rows.
            batch_invariant=False,
            max_world_size=self.runtime.module.device_count(),
        )
        self.defaults = Defaults(
            dtype=dtypes[0],
            block_size=16,
            max_num_batched_tokens=8192,
            device_memory_utilization=0.9,
            async_scheduling=True,
        )

    def attention_backends(self) -> tuple[str, ...]:
        """Those that were put in; the oracle comes last."""
        return (*self.backends, ReferenceAttention.name)

    def unavailable_backends(self) -> Mapping[str, str]:
        """Optional libraries that are missing, or do not fit."""
        return self.unavailable

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        """Makes the backend. Raises ConfigError, with the reason, where it is not available."""
        if name in self.unavailable:
            raise ConfigError(f"attention backend {name!r}: {self.unavailable[name]}")
        make = self.backends.get(name)
        return super().attention(name, shape) if make is None else make(shape)

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        """Triton's kernels, and those of optional libraries."""
        return self.providers

    def linear_methods(self) -> Mapping[str, tuple[LinearMethod, ...]]:
        """By scheme."""
        return self.methods

    def graph_runner(self) -> GraphRunner:
        """Captures decode steps where the device can; else every step runs as it comes."""
        if not self.capabilities.graphs:
            return super().graph_runner()
        return GraphCapturer(self.runtime, self.device_allocator)

    def communicator(self, rank: int, world_size: int) -> Communicator:
        """Joins the group, of one rank per device."""
        if (rank, world_size) == (0, 1):
            return SingleRank()
        most = self.capabilities.max_world_size
        if self.make_group is None or not 0 <= rank < world_size <= most:
            raise ConfigError(
                f"platform {self.name!r} runs a model on at most {most} of its devices here; rank {rank} of "
                f"{world_size} was asked for"
            )
        return collectives.join(self.make_group, rank, world_size, self.runtime, library=self.library)

    def memory_info(self) -> MemoryInfo:
        """By the driver and torch's allocator."""
        return memory.info(self.runtime)

    def memory_profile(self, work: Callable[[], None]) -> MemoryProfile | None:
        """By torch's account of this process."""
        return memory.profile(self.runtime, work)

    def max_swap_bytes(self, device_bytes: int) -> int | None:
        """What the host has left: the device's memory is its own."""
        return memory.host_bytes()

    def stream(self) -> Stream:
        """One of torch's."""
        return DeviceStream(self.runtime)

    def synchronize(self) -> None:
        """Waits for the device."""
        self.runtime.synchronize()

    def seed(self, seed: int) -> None:
        """The host's generators, and those of all devices of this kind."""
        torch.manual_seed(seed)
        self.runtime.module.manual_seed_all(seed)


def nccl_group(store: Any, rank: int, world_size: int) -> Any:
    """A process group over NCCL, or over RCCL, which torch has under the same name."""
    dist: Any = torch.distributed
    return dist.ProcessGroupNCCL(store, rank, world_size, dist.ProcessGroupNCCL.Options())
