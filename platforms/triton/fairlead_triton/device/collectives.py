"""What ranks say to each other, over torch.distributed's process groups (NCCL, RCCL, XCCL)."""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from fairlead.errors import ConfigError
from fairlead_triton.device.runtime import Runtime

MakeGroup = Callable[[Any, int, int], Any]
"""Store, rank and size to a process group."""
dist: Any = torch.distributed  # most of what is used here has no types
_ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


class ProcessGroupCommunicator:
    """Communicator over one process group of its own: torch's global default group is neither made nor used."""

    def __init__(self, group: Any, rank: int, world_size: int, runtime: Runtime) -> None:
        self.rank, self.world_size = rank, world_size
        self._group, self._runtime = group, runtime

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum, the same bits everywhere: each library adds in one order for all ranks."""
        result = tensor.clone(memory_format=torch.contiguous_format)
        self._wait("all_reduce", lambda: self._group.allreduce([result]))
        return result

    def all_gather(self, tensor: torch.Tensor, *, dim: int = 0) -> torch.Tensor:
        """Side by side."""
        mine = tensor.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        self._wait("all_gather", lambda: self._group.allgather([parts], [mine]))
        return torch.cat(parts, dim=dim)

    def broadcast(self, tensor: torch.Tensor, *, source: int) -> torch.Tensor:
        """A copy of the source's."""
        result = tensor.clone(memory_format=torch.contiguous_format)
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        self._wait("broadcast", lambda: self._group.broadcast([result], options))
        return result

    def send(self, tensor: torch.Tensor, *, destination: int) -> None:
        """To the peer; what this stream does to the tensor next comes after."""
        self._check_peer(destination)
        self._wait("send", lambda: self._group.send([tensor.contiguous()], destination, 0))

    def recv(self, tensor: torch.Tensor, *, source: int) -> None:
        """From the peer."""
        self._check_peer(source)
        received = tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        self._wait("recv", lambda: self._group.recv([received], source, 0))
        if received is not tensor:
            tensor.copy_(received)

    def barrier(self) -> None:
        """By a sum that this thread waits for: the libraries' own barriers guess a device."""
        flag = torch.zeros(1, device=self._runtime.torch_device)
        self._wait("barrier", lambda: self._group.allreduce([flag]))
        self._runtime.synchronize()

    def _wait(self, call: str, start: Callable[[], Any]) -> None:
        self._runtime.make_current()
        with _named(f"rank {self.rank} of {self.world_size} failed in {call}"):
            start().wait()

    def _check_peer(self, rank: int) -> None:
        if rank == self.rank or not 0 <= rank < self.world_size:
            raise RuntimeError(f"rank {self.rank} of {self.world_size} cannot talk to rank {rank}")


@contextmanager
def _named(what: str) -> Iterator[None]:
    """A RuntimeError that says who failed in which call: a library's own names neither."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"{what}: a rank is gone, or made another call ({' '.join(str(error).split())})") from error


def join(
    make_group: MakeGroup,
    rank: int,
    world_size: int,
    runtime: Runtime,
    *,
    library: str,
    environment: Mapping[str, str] = os.environ,
) -> ProcessGroupCommunicator:
    """Meets the other ranks; blocks until all are there.

    Processes meet at MASTER_ADDR and MASTER_PORT, as torchrun sets them. Without these the ranks are threads of this
    process. Raises ConfigError if the group cannot be made.
    """
    runtime.make_current()
    try:
        group = make_group(_store(rank, world_size, environment), rank, world_size)
    except (RuntimeError, OSError, ValueError) as error:
        where = ":".join(environment.get(name, "") for name in _ADDRESS).strip(":") or "this process"
        raise ConfigError(
            f"rank {rank} of {world_size} found no group over {library} at {where}: {' '.join(str(error).split())}; "
            f"start every rank with the same {' and '.join(_ADDRESS)}"
        ) from error
    return ProcessGroupCommunicator(group, rank, world_size, runtime)


def _store(rank: int, world_size: int, environment: Mapping[str, str]) -> Any:
    given = [name for name in _ADDRESS if environment.get(name)]
    if len(given) == 1:
        missing = next(name for name in _ADDRESS if name not in given)
        raise ValueError(f"{given[0]} is set, but {missing} is not")
    if given:
        host, port = (environment[name] for name in _ADDRESS)
        is_master = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store: Any = dist.TCPStore(host, int(port), world_size, is_master, multi_tenant=True, wait_for_workers=False)
    else:
        store = dist.FileStore(str(_meeting_place()), world_size)
    # The how-manieth group of this rank it is: keys of earlier groups are still in the store.
    number = store.add(f"fairlead/{world_size}/{rank}", 1)
    return dist.PrefixStore(f"fairlead/{world_size}/group {number}", store)


def _meeting_place() -> Path:
    """A file of this process: its start is in the name, since a process's number is used again."""
    try:
        start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # proc_pid_stat(5), starttime
    except OSError:
        start = "0"
    return Path(tempfile.gettempdir()) / f"fairlead-{os.getuid()}-{os.getpid()}-{start}"
