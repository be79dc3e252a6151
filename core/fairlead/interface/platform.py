"""The platform itself: what `PlatformSpec.create` returns."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from fairlead.interface.attention import AttentionBackend, AttentionShape
from fairlead.interface.memory import MemoryAllocator, MemoryInfo, MemoryProfile
from fairlead.interface.spec import Capabilities, Defaults, Device, OpProvider

if TYPE_CHECKING:
    import torch


class Platform(Protocol):
    """One device, ready to run models. Methods return data; the core applies it."""

    name: str
    device: Device
    torch_device: "torch.device"
    capabilities: Capabilities
    defaults: Defaults
    allocator: MemoryAllocator

    def attention_backends(self) -> tuple[str, ...]:
        """Names of the attention backends, the preferred one first."""
        ...

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        """Makes the named backend for a model of this shape; allocates nothing yet."""
        ...

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        """The platform's own providers by op name; an op without one runs its reference."""
        ...

    def memory_info(self) -> MemoryInfo:
        """The device's memory now."""
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
