"""Memory for the results of recorded calls: it stays where it is, and is used again as soon as a result is gone."""

import bisect
import ctypes
import math
import weakref

import torch

_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 22


class Arena:
    """Hands out tensors from chunks that are never given back while the arena lives.

    A region is free again when the last tensor or view of its storage is gone. First fit: the sizes of a model's
    layers repeat.
    """

    def __init__(self) -> None:
        self._chunks: list[torch.Tensor] = []
        self._free: list[tuple[int, int]] = []  # (address, bytes), sorted, never adjacent

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised, contiguous tensor."""
        num_items = math.prod(shape)
        if not num_items:
            return torch.empty(shape, dtype=dtype)
        taken = -(-num_items * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        buffer = (ctypes.c_char * taken).from_address(self._take(taken))
        weakref.finalize(buffer, self._give, ctypes.addressof(buffer), taken)
        return torch.frombuffer(buffer, dtype=dtype, count=num_items).view(shape)

    def _take(self, num_bytes: int) -> int:
        for i, (address, size) in enumerate(self._free):
            if size >= num_bytes:
                if size == num_bytes:
                    del self._free[i]
                else:
                    self._free[i] = (address + num_bytes, size - num_bytes)
                return address
        chunk = torch.empty(max(num_bytes, _CHUNK_BYTES) + _ALIGNMENT, dtype=torch.uint8)
        self._chunks.append(chunk)
        start = -(-chunk.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self._give(start, max(num_bytes, _CHUNK_BYTES))
        return self._take(num_bytes)

    def _give(self, address: int, num_bytes: int) -> None:
        i = bisect.bisect(self._free, (address, 0))
        if i < len(self._free) and address + num_bytes == self._free[i][0]:
            num_bytes += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == address:
            before, size = self._free.pop(i - 1)
            address, num_bytes, i = before, size + num_bytes, i - 1
        self._free.insert(i, (address, num_bytes))
