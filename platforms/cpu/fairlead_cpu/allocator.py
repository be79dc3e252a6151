"""Host memory in pools; what sleeps goes to a file."""

import ctypes
import tempfile
import weakref
from collections.abc import Callable

import torch

from fairlead.ops.memory import PooledAllocator


class HostAllocator(PooledAllocator):
    """MemoryAllocator over host memory. Its pages are the process's once they are written.

    Offloaded contents go to files without a name in the directory for temporary files (TMPDIR), and back from there:
    another copy in host memory would free nothing.
    """

    def __init__(self) -> None:
        super().__init__(lambda shape, dtype: torch.empty(shape, dtype=dtype))
        self.num_restores = 0
        """How often memory has come back, and maybe to another place."""

    def restore(self, tag: str) -> None:
        """Storages get memory anew: addresses taken before are stale."""
        self.num_restores += 1
        super().restore(tag)

    def _keep(self, contents: torch.Tensor) -> Callable[[torch.Tensor], None]:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (it lives as long as what fills from it)
        _transfer(file.write, contents)

        def fill(memory: torch.Tensor) -> None:
            file.seek(0)
            _transfer(file.readinto, memory)

        weakref.finalize(fill, file.close)
        return fill


def _transfer(move: Callable[[memoryview], int | None], contents: torch.Tensor) -> None:
    """Moves bytes between a file and a tensor. Not through NumPy: torch never resizes a storage that it has shared."""
    rest = memoryview((ctypes.c_char * contents.nbytes).from_address(contents.data_ptr())).cast("B")
    while rest:  # one call may move less than it was given
        num_moved = move(rest)
        if not num_moved:
            raise OSError("a file of offloaded memory ended early")
        rest = rest[num_moved:]
