"""The platform itself: what `PlatformSpec.create` returns."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from fairlead.interface.attention import AttentionBackend, AttentionShape
from fairlead.interface.collectives import Communicator
from fairlead.interface.graph import GraphRunner
from fairlead.interface.linear import LinearMethod
from fairlead.interface.memory import MemoryAllocator, MemoryInfo, MemoryProfile
from fairlead.interface.spec import Capabilities, Defaults, Device, OpProvider
from fairlead.interface.streams import Stream

if TYPE_CHECKING:
    import torch


class Platform(Protocol):
    """One device, ready to run models. Methods return data; the core applies it.

    `fairlead.ops.platform.BasicPlatform` is one made of references, to start from. Nothing may be module-global: two
    platforms, and two of the same kind, live in one process.
    """

    name: str
    device: Device
    torch_device: "torch.device"
    capabilities: Capabilities
    defaults: Defaults
    allocator: MemoryAllocator

    def attention_backends(self) -> tuple[str, ...]:
        """Names of the attention backends, the preferred one first."""
        ...

    def unavailable_backends(self) -> Mapping[str, str]:
        """Attention backends that the platform knows but cannot offer here, with the reason: an optional library is
        not installed, or does not fit the device. They are named to a user who asks for one."""
        ...

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        """Makes the named backend for a group of layers of this shape; allocates nothing yet.

        Raises ConfigError, saying why, where the backend cannot serve them: the next one is asked then, unless the user
        named this one.
        """
        ...

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        """The platform's own providers by op name; an op without one runs its reference."""
        ...

    def linear_methods(self) -> Mapping[str, tuple[LinearMethod, ...]]:
        """The platform's own ways to store and multiply linear weights, by scheme, the preferred one first.

        A scheme without one runs its reference (`fairlead.ops.linear`).
        """
        ...

    def graph_runner(self) -> GraphRunner:
        """Makes what runs the forward passes of one engine."""
        ...

    def communicator(self, rank: int, world_size: int) -> Communicator:
        """Joins a group of ranks; blocks until all are there.

        Raises ConfigError for a size above 1 if the capabilities have no `collectives`.
        """
        ...

    def memory_info(self) -> MemoryInfo:
        """The device's memory now. Cheap: it may be asked for once a step."""
        ...

    def stream(self) -> Stream:
        """Makes a stream of the device."""
        ...

    def memory_profile(self, work: Callable[[], None]) -> MemoryProfile | None:
        """Runs the work, waits for it, and says what it took; None where the device cannot tell.

        The core runs one large step so, to learn what activations need beside weights and KV cache. Only this
        process counts: that free memory grows or shrinks meanwhile is no fault. What the work raises goes on.
        """
        ...

    def max_swap_bytes(self, device_bytes: int) -> int | None:
        """Host memory in bytes that swapped KV blocks may take now, once `device_bytes` more of the device are used.

        None if the attention backends cannot copy blocks to the host and back.
        """
        ...

    def synchronize(self) -> None:
        """Waits until the device has done all that was asked of it."""
        ...

    def seed(self, seed: int) -> None:
        """Seeds the device's random generators, for tests and for foreign model code that draws from them.

        The core's own sampling does not, and an engine in a user's process leaves them alone.
        """
        ...
