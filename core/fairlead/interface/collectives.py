"""What the ranks of one engine say to each other."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Communicator(Protocol):
    """Collectives of a group of `world_size` ranks, of which this is number `rank`.

    Every rank makes the same calls in the same order, with tensors of equal shape and dtype on its own device; `send`
    and `recv` come in pairs. A call returns when its result may be used on the current stream. Raises
    RuntimeError, on every rank that waits, when a rank is gone or the calls do not match.
    """

    rank: int
    world_size: int

    def all_reduce(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The sum over all ranks, in the tensor's dtype or better: a new tensor, bitwise equal on every rank."""
        ...

    def all_gather(self, tensor: "torch.Tensor", *, dim: int = 0) -> "torch.Tensor":
        """The tensors of all ranks side by side along `dim`, in order of rank: a new tensor, bitwise exact."""
        ...

    def broadcast(self, tensor: "torch.Tensor", *, source: int) -> "torch.Tensor":
        """The source rank's tensor: a new one, bitwise exact; what the others pass tells shape and dtype only."""
        ...

    def send(self, tensor: "torch.Tensor", *, destination: int) -> None:
        """Sends to one other rank; the tensor may be changed as soon as this returns."""
        ...

    def recv(self, tensor: "torch.Tensor", *, source: int) -> None:
        """Fills the tensor with what the other rank sends next to this one."""
        ...

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        ...
