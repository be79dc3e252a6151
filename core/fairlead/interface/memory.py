"""Memory of a device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


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
    """Hands out the device's memory under tags, so that it can be accounted for (and later offloaded) by tag."""

    def empty(self, shape: tuple[int, ...], dtype: "torch.dtype", *, tag: str) -> "torch.Tensor":
        """Returns an uninitialised, contiguous tensor on the device; the caller owns it.

        `tag` is "weights" or "kv_cache". Raises MemoryError when the device has too little left.
        """
        ...

    def allocated_bytes(self, tag: str) -> int:
        """Bytes handed out under the tag that are still alive."""
        ...
