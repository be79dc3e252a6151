"""Host memory by tag."""

import weakref

import torch


class HostAllocator:
    """MemoryAllocator over host memory; counts what is alive under each tag."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, tag: str) -> torch.Tensor:
        """An uninitialised tensor; the pages are the process's once they are written."""
        try:
            tensor = torch.empty(shape, dtype=dtype)
        except RuntimeError as error:  # torch's host allocator has no type of its own for this
            raise MemoryError(f"cannot allocate {shape} of {dtype} for {tag}: {error}") from error
        storage = tensor.untyped_storage()
        self._add(tag, storage.nbytes())
        weakref.finalize(storage, self._add, tag, -storage.nbytes())
        return tensor

    def allocated_bytes(self, tag: str) -> int:
        """Bytes alive under the tag."""
        return self._bytes.get(tag, 0)

    def _add(self, tag: str, num_bytes: int) -> None:
        self._bytes[tag] = self._bytes.get(tag, 0) + num_bytes
