"""Memory of a device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

TAGS = ("weights", "kv_cache")
"""The pools of an allocator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInfo:
    """Memory of a device in bytes. `free_bytes` is what this process could still allocate."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProfile:
    """What a piece of work took from the device, beyond what this process had before, in bytes.

    `peak_bytes` is the most at one time; `kept_bytes` of it are still held at the end (workspaces, caches of
    libraries). What other processes did meanwhile is in neither.
    """

    peak_bytes: int
    kept_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.kept_bytes <= self.peak_bytes:
            raise ValueError(f"a memory profile keeps between 0 and its peak, got {self!r}")


class MemoryAllocator(Protocol):
    """Hands out the device's memory in pools, one per tag of TAGS, that can be taken away and given back as a whole.

    That is how an engine sleeps. While a pool is away its tensors still exist, but nothing may read or write them;
    `restore` gives the same tensors (and all views of them) memory again. Their addresses may have changed, so nobody
    keeps an address from before. Nor is a tensor of a pool handed to NumPy or to another process, which pins its
    memory: `offload` and `discard` raise RuntimeError then, with nothing changed. Calls for a tag without tensors do
    nothing. Not thread-safe.
    """

    def empty(self, shape: tuple[int, ...], dtype: "torch.dtype", *, tag: str) -> "torch.Tensor":
        """Returns an uninitialised, contiguous tensor on the device; the caller owns it, and its memory is free once
        nobody holds it or a view of it.

        Raises MemoryError when the device has too little left, and ValueError for a tag that is not in TAGS or whose
        pool is away.
        """
        ...

    def allocated_bytes(self, tag: str) -> int:
        """Bytes of the device that the pool's living tensors take now: 0 while it is away."""
        ...

    def offload(self, tag: str) -> None:
        """Moves the pool's contents off the device (on the host: out of its memory) and frees what they took there.

        Raises ValueError if the pool is away already, and OSError or MemoryError, with nothing changed, where the
        contents find no place.
        """
        ...

    def discard(self, tag: str) -> None:
        """Frees the pool's memory on the device and forgets what was in it. Raises ValueError if the pool is away."""
        ...

    def restore(self, tag: str) -> None:
        """Gives the pool memory again: with its contents after `offload`, uninitialised after `discard`.

        Does nothing if the pool is not away. Raises MemoryError when the device has too little left; the pool then
        stays away, and what was offloaded is not lost.
        """
        ...
