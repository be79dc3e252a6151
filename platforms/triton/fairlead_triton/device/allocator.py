"""Device memory in pools that can be taken away and given back."""

import weakref
from collections.abc import Iterable
from typing import Protocol

import torch

from fairlead.ops.memory import Fill, PooledAllocator
from fairlead_triton.device.runtime import Runtime


class Holder(Protocol):
    """What keeps addresses, or memory of its own beside the pools, and lets go of both when told."""

    def release(self) -> None:
        """Forgets addresses and frees memory."""
        ...


class DeviceAllocator(PooledAllocator):
    """MemoryAllocator over torch's caching allocator. A pool that goes away returns its memory to the device, so that
    other processes have it; tensors stay, and their storages get memory anew."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime.empty)
        self._runtime = runtime
        self._holders: weakref.WeakSet[Holder] = weakref.WeakSet()
        self.generation = 0
        """Changes whenever tensors may have got other addresses: on every allocation, and when a pool comes back."""

    def add_holder(self, holder: Holder) -> None:
        """Tells it from now on when a pool leaves; holds no reference to it."""
        self._holders.add(holder)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, tag: str) -> torch.Tensor:
        """One tensor of the pool."""
        self.generation += 1
        return super().empty(shape, dtype, tag=tag)

    def restore(self, tag: str) -> None:
        """Storages get memory anew: addresses taken before are stale."""
        self.generation += 1
        super().restore(tag)

    def _release(self, tag: str, kept: Iterable[tuple[torch.UntypedStorage, Fill | None]]) -> None:
        self._runtime.synchronize()  # launches that are queued still read what is about to go
        for holder in list(self._holders):
            holder.release()
        super()._release(tag, kept)
        self._runtime.module.empty_cache()
