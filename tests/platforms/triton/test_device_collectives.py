"""Ranks over torch.distributed: the same results as ranks that are threads, and errors that name rank and call."""

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_device import FakeModule, FakeStream, fake_runtime

from fairlead.errors import ConfigError
from fairlead.interface import Communicator
from fairlead.testing.collectives import ThreadCommunicator
from fairlead_triton.device.collectives import ProcessGroupCommunicator, join
from fairlead_triton.device.streams import DeviceStream


def gloo(store: Any, rank: int, size: int) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=20))


def each(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What every rank's thread returns, or raises."""
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def meet(rank: int, size: int, environment: dict[str, str] | None = None) -> ProcessGroupCommunicator:
    module = FakeModule(num_devices=size)
    runtime = fake_runtime(module, rank)
    found = join(gloo, rank, size, runtime, library="gloo", environment=environment or {})
    assert module.current_device() == rank
    return found


def talk(c: Communicator) -> list[torch.Tensor]:
    mine = (torch.arange(6.0).view(2, 3) + 10 * c.rank).to(torch.bfloat16)
    strided = mine.T
    heard = [c.all_reduce(mine), c.all_reduce(strided), c.all_gather(mine), c.all_gather(strided, dim=1)]
    heard += [c.broadcast(strided, source=source) for source in range(c.world_size)]
    got = torch.zeros(3, 2, dtype=torch.bfloat16).T
    if c.rank == 0:
        c.send(strided.T, destination=1)
    elif c.rank == 1:
        c.recv(got, source=0)
    c.barrier()
    return [*heard, got, mine]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_hear_what_the_oracle_hears(size: int) -> None:
    found = each(size, lambda rank: talk(meet(rank, size)))
    oracle = ThreadCommunicator.group(size)
    wanted = each(size, lambda rank: talk(oracle[rank]))
    for got, want in zip(found, wanted, strict=True):
        assert not isinstance(got, Exception), got
        assert len(got) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_process_may_make_one_group_after_another() -> None:
    for _ in range(2):
        found = each(2, lambda rank: meet(rank, 2).all_gather(torch.tensor([rank])).tolist())
        assert found == [[0, 1], [0, 1]]


def test_processes_meet_where_the_environment_says() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    port = store.port
    del store
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = each(2, lambda rank: meet(rank, 2, environment).all_reduce(torch.tensor([rank + 1])).tolist())
    assert found == [[3], [3]]


def test_half_an_address_is_none() -> None:
    message = "rank 0 of 2 found no group over gloo at node: MASTER_ADDR is set, but MASTER_PORT is not; start every"
    with pytest.raises(ConfigError, match=message):
        meet(0, 2, {"MASTER_ADDR": "node"})


class BrokenGroup:
    def allreduce(self, tensors: list[torch.Tensor]) -> Any:
        raise RuntimeError("connection\n  closed")


def test_an_error_names_rank_and_call() -> None:
    c = ProcessGroupCommunicator(BrokenGroup(), 1, 2, fake_runtime())
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed in all_reduce: a rank is gone.*connection closed"):
        c.all_reduce(torch.ones(1))
    for peer in (1, 2, -1):
        with pytest.raises(RuntimeError, match=f"rank 1 of 2 cannot talk to rank {peer}"):
            c.send(torch.ones(1), destination=peer)


def test_work_goes_to_the_stream_that_was_entered() -> None:
    module = FakeModule()
    first, second = (DeviceStream(fake_runtime(module)) for _ in range(2))
    with first:
        inner: list[FakeStream] = [module.stream_stack[-1]]
        with second, first:
            inner += module.stream_stack[-2:]
        event = first.record()
    assert inner[0] is inner[2] is not inner[1]
    assert module.stream_stack == []
    second.wait(event)
    assert inner[1].waited_for == [event]
    assert event.query() is False
    first.synchronize()
    assert event.query() is True
