"""Ranks as threads of one process: the fake of Communicator, and the oracle of real ones."""

import threading
from dataclasses import dataclass, field
from queue import Queue

import torch

_WAIT_S = 60.0


@dataclass
class _Group:
    """What the ranks share. The slots are written before a barrier and read between it and the next one."""

    slots: list[tuple[str, torch.Tensor | None]]
    barrier: threading.Barrier
    mailboxes: dict[tuple[int, int], "Queue[torch.Tensor]"] = field(default_factory=dict)


class ThreadCommunicator:
    """Communicator of one rank; `group` makes them all, each for a thread of its own.

    A call that does not match the other ranks' raises RuntimeError on all of them, and so do all calls after it.
    """

    def __init__(self, rank: int, group: _Group) -> None:
        self.rank, self.world_size = rank, len(group.slots)
        self._group = group

    @classmethod
    def group(cls, world_size: int) -> "tuple[ThreadCommunicator, ...]":
        """One communicator per rank."""
        shared = _Group(slots=[("", None)] * world_size, barrier=threading.Barrier(world_size, timeout=_WAIT_S))
        for source in range(world_size):
            for destination in range(world_size):
                shared.mailboxes[source, destination] = Queue()
        return tuple(cls(rank, shared) for rank in range(world_size))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds in order of rank, so that every rank gets the same bits."""
        total, *others = self._exchange("all_reduce", tensor)
        total = total.clone()
        for other in others:
            total += other
        return self._done(total)

    def all_gather(self, tensor: torch.Tensor, *, dim: int = 0) -> torch.Tensor:
        """Side by side."""
        return self._done(torch.cat(self._exchange(f"all_gather along {dim}", tensor), dim=dim))

    def broadcast(self, tensor: torch.Tensor, *, source: int) -> torch.Tensor:
        """A copy of the source's."""
        return self._done(self._exchange(f"broadcast from {source}", tensor)[source].clone())

    def send(self, tensor: torch.Tensor, *, destination: int) -> None:
        """Leaves a copy."""
        self._check_peer(destination)
        self._group.mailboxes[self.rank, destination].put(tensor.clone())

    def recv(self, tensor: torch.Tensor, *, source: int) -> None:
        """Takes the oldest copy."""
        self._check_peer(source)
        sent = self._group.mailboxes[source, self.rank].get(timeout=_WAIT_S)
        if (sent.shape, sent.dtype) != (tensor.shape, tensor.dtype):
            raise RuntimeError(
                f"rank {self.rank} expects {tuple(tensor.shape)} of {tensor.dtype}, rank {source} sent "
                f"{tuple(sent.shape)} of {sent.dtype}"
            )
        tensor.copy_(sent)

    def barrier(self) -> None:
        """Waits for all."""
        self._exchange("barrier", None)
        self._wait()

    def _exchange(self, call: str, tensor: torch.Tensor | None) -> list[torch.Tensor]:
        """Every rank's tensor of this call; `_done` must follow before anybody changes one."""
        what = call if tensor is None else f"{call} of {tuple(tensor.shape)}, {tensor.dtype}"
        self._group.slots[self.rank] = what, tensor
        self._wait()
        calls = [name for name, _ in self._group.slots]
        if len(set(calls)) > 1:
            self._group.barrier.abort()
            raise RuntimeError("the ranks do not make the same call: " + "; ".join(calls))
        return [tensor for _, tensor in self._group.slots if tensor is not None]

    def _done(self, result: torch.Tensor) -> torch.Tensor:
        self._wait()
        return result

    def _wait(self) -> None:
        try:
            self._group.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RuntimeError(f"rank {self.rank} waits for a rank that is gone, or made another call") from error

    def _check_peer(self, rank: int) -> None:
        if rank == self.rank or not 0 <= rank < self.world_size:
            raise RuntimeError(f"rank {self.rank} of {self.world_size} cannot talk to rank {rank}")
