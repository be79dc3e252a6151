"""Pools of device memory over torch's storages: the reference of MemoryAllocator."""

import weakref
from collections.abc import Callable, Iterable

import torch

from fairlead.interface import TAGS

Fill = Callable[[torch.Tensor], None]
Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


class PooledAllocator:
    """MemoryAllocator that asks `allocate` for each tensor, and takes its memory away by resizing the storage.

    `allocate` raises MemoryError, or RuntimeError as torch's allocators do. `storage_of` is for devices whose tensors
    hold their memory in their own way. Offloaded contents are kept by `_keep`, in host memory unless overridden.
    """

    def __init__(
        self,
        allocate: Allocate,
        *,
        storage_of: Callable[[torch.Tensor], torch.UntypedStorage] = torch.Tensor.untyped_storage,
    ) -> None:
        self._allocate, self._storage_of = allocate, storage_of
        self._storages: dict[str, weakref.WeakSet[torch.UntypedStorage]] = {tag: weakref.WeakSet() for tag in TAGS}
        self._away: dict[str, list[tuple[weakref.ref[torch.UntypedStorage], int, Fill | None]]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, tag: str) -> torch.Tensor:
        """One tensor of the pool."""
        self._check_present(tag)
        try:
            tensor = self._allocate(shape, dtype)
        except RuntimeError as error:  # torch's allocators have no type of their own for this
            raise MemoryError(f"cannot allocate {shape} of {dtype} for {tag}: {error}") from error
        self._storages[tag].add(self._storage_of(tensor))
        return tensor

    def allocated_bytes(self, tag: str) -> int:
        """Bytes of the pool's living storages."""
        return sum(storage.nbytes() for storage in self._storages[tag])

    def offload(self, tag: str) -> None:
        """Keeps the contents, then frees the pool."""
        self._check_can_leave(tag)
        self._release(tag, [(storage, self._keep(_as_bytes(storage))) for storage in self._storages[tag]])

    def discard(self, tag: str) -> None:
        """Frees the pool."""
        self._check_can_leave(tag)
        self._release(tag, [(storage, None) for storage in self._storages[tag]])

    def restore(self, tag: str) -> None:
        """Storages that died meanwhile are left out; one that has its memory again is not asked twice."""
        for reference, num_bytes, fill in self._away.get(tag, []):
            storage = reference()
            if storage is None or storage.nbytes() == num_bytes:
                continue
            try:
                storage.resize_(num_bytes)
            except RuntimeError as error:
                raise MemoryError(f"cannot give {tag} its {num_bytes} bytes again: {error}") from error
            if fill is not None:
                fill(_as_bytes(storage))
        self._away.pop(tag, None)

    def _keep(self, contents: torch.Tensor) -> Fill:
        """Copies bytes to where they can stay; returns what copies them back."""
        kept = contents.to("cpu", copy=True)

        def fill(memory: torch.Tensor) -> None:
            memory.copy_(kept)

        return fill

    def _release(self, tag: str, kept: Iterable[tuple[torch.UntypedStorage, Fill | None]]) -> None:
        away = self._away[tag] = []
        for storage, fill in kept:
            away.append((weakref.ref(storage), storage.nbytes(), fill))
            storage.resize_(0)

    def _check_can_leave(self, tag: str) -> None:
        self._check_present(tag)
        num_pinned = sum(not storage.resizable() for storage in self._storages[tag])
        if num_pinned:
            raise RuntimeError(
                f"{num_pinned} tensors of the pool {tag!r} cannot give their memory away: it was handed to NumPy, or "
                "to another process"
            )

    def _check_present(self, tag: str) -> None:
        if tag not in TAGS:
            raise ValueError(f"there is no pool {tag!r}; the pools are: {', '.join(TAGS)}")
        if tag in self._away:
            raise ValueError(f"the pool {tag!r} is away; restore it first")


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The storage as a tensor of bytes, on the same device."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
