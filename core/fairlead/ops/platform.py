"""A platform made of references: what a new one starts from, and replaces one by one."""

from collections.abc import Callable, Mapping

import torch

from fairlead.errors import ConfigError
from fairlead.interface import (
    AttentionBackend,
    AttentionShape,
    Capabilities,
    Communicator,
    Defaults,
    Device,
    Event,
    GraphRunner,
    LinearMethod,
    MemoryAllocator,
    MemoryInfo,
    MemoryProfile,
    OpProvider,
    Stream,
)
from fairlead.ops.attention import ReferenceAttention
from fairlead.ops.graph import PassThrough
from fairlead.ops.memory import PooledAllocator


class BasicPlatform:
    """A Platform of what a subclass must say (`name`, `torch_device`, `memory_info`, and usually `allocate`,
    `synchronize` and `seed`) and references for the rest.

    Every tensor operation runs through torch on `torch_device`.
    """

    name: str
    torch_device: torch.device
    capabilities = Capabilities(dtypes=("float32", "bfloat16", "float16"), block_sizes=(16,))
    defaults = Defaults(dtype="float32", block_size=16, max_num_batched_tokens=2048, device_memory_utilization=0.9)

    def __init__(self, device: Device) -> None:
        self.device = device
        self.allocator: MemoryAllocator = PooledAllocator(self.allocate)

    def memory_info(self) -> MemoryInfo:
        """The device's memory now."""
        raise NotImplementedError(f"{type(self).__name__} must say how much memory its device has")

    def memory_profile(self, work: Callable[[], None]) -> MemoryProfile | None:
        """Runs the work; torch has no account of a device's peak that all devices share."""
        work()
        return None

    def max_swap_bytes(self, device_bytes: int) -> int | None:
        """No copies to the host."""
        return None

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor on the device. Raises MemoryError or RuntimeError if there is no room."""
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def synchronize(self) -> None:
        """Nothing to wait for, if calls return when their work is done."""

    def seed(self, seed: int) -> None:
        """Torch's own generators."""
        torch.manual_seed(seed)

    def attention_backends(self) -> tuple[str, ...]:
        """The oracle alone."""
        return (ReferenceAttention.name,)

    def unavailable_backends(self) -> Mapping[str, str]:
        """None that it could offer elsewhere."""
        return {}

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        """Makes the backend."""
        if name != ReferenceAttention.name:
            known = ", ".join(self.attention_backends())
            raise ConfigError(f"platform {self.name!r} has no attention backend {name!r}; it has: {known}")
        return ReferenceAttention(shape, self.allocator, self.torch_device)

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        """None of its own."""
        return {}

    def linear_methods(self) -> Mapping[str, tuple[LinearMethod, ...]]:
        """None of its own."""
        return {}

    def graph_runner(self) -> GraphRunner:
        """Every step as it comes."""
        return PassThrough()

    def communicator(self, rank: int, world_size: int) -> Communicator:
        """A group of one."""
        if (rank, world_size) != (0, 1):
            raise ConfigError(f"platform {self.name!r} runs a model on one device only, not on {world_size}")
        return SingleRank()

    def stream(self) -> Stream:
        """One that does nothing, for devices whose calls return when their work is done."""
        return EagerStream()


class EagerStream:
    """Stream and Event of a device that has no queues."""

    def __enter__(self) -> "EagerStream":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def record(self) -> Event:
        """All work is done already."""
        return self

    def wait(self, event: Event) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """All work is done."""
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""


class SingleRank:
    """The reference of Communicator: a group of one, which has nobody to send to."""

    rank, world_size = 0, 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy."""
        return tensor.clone()

    def all_gather(self, tensor: torch.Tensor, *, dim: int = 0) -> torch.Tensor:
        """A copy."""
        return tensor.clone()

    def broadcast(self, tensor: torch.Tensor, *, source: int) -> torch.Tensor:
        """A copy."""
        return tensor.clone()

    def send(self, tensor: torch.Tensor, *, destination: int) -> None:
        """There is no other rank."""
        raise RuntimeError(f"there is no rank {destination} in a group of one")

    def recv(self, tensor: torch.Tensor, *, source: int) -> None:
        """There is no other rank."""
        raise RuntimeError(f"there is no rank {source} in a group of one")

    def barrier(self) -> None:
        """Everybody is here."""
