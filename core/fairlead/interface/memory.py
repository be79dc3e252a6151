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
