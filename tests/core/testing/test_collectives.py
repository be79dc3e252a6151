"""Threads as ranks, and the group of one: collectives do what the protocol says."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fairlead.interface import Communicator
from fairlead.ops.platform import SingleRank
from fairlead.testing.collectives import ThreadCommunicator


def run(world_size: int, work: Callable[[Communicator], object]) -> list[object]:
    """What each rank's work returned, or the exception that it raised."""

    def guarded(communicator: Communicator) -> object:
        try:
            return work(communicator)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(guarded, ThreadCommunicator.group(world_size)))


def value(rank: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_all_reduce_adds_and_is_the_same_everywhere(world_size: int) -> None:
    def work(c: Communicator) -> torch.Tensor:
        mine = value(c.rank)
        total = c.all_reduce(mine)
        assert torch.equal(mine, value(c.rank))
        mine.zero_()  # nobody sees that any more
        return total

    totals = [t for t in run(world_size, work) if isinstance(t, torch.Tensor)]
    assert len(totals) == world_size
    expected = torch.stack([value(rank) for rank in range(world_size)]).sum(0)
    torch.testing.assert_close(totals[0], expected)
    assert all(torch.equal(total, totals[0]) for total in totals)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_all_gather_puts_ranks_side_by_side(dim: int) -> None:
    expected = torch.cat([value(rank) for rank in range(3)], dim=dim)
    for gathered in run(3, lambda c: c.all_gather(value(c.rank), dim=dim)):
        assert isinstance(gathered, torch.Tensor)
        assert torch.equal(gathered, expected)


def test_broadcast_gives_everyone_the_sources() -> None:
    for received in run(3, lambda c: c.broadcast(value(c.rank), source=1)):
        assert isinstance(received, torch.Tensor)
        assert torch.equal(received, value(1))


def test_a_ring_of_sends_keeps_order_and_copies() -> None:
    def work(c: Communicator) -> list[torch.Tensor]:
        mine, received = value(c.rank), []
        for _ in range(3):
            c.send(mine, destination=(c.rank + 1) % c.world_size)
            mine += 1
        for _ in range(3):
            tensor = torch.empty(3, 4)
            c.recv(tensor, source=(c.rank - 1) % c.world_size)
            received.append(tensor)
        c.barrier()
        return received

    for rank, received in enumerate(run(3, work)):
        assert isinstance(received, list)
        for step, tensor in enumerate(received):
            torch.testing.assert_close(tensor, value((rank - 1) % 3) + step)


@pytest.mark.parametrize(
    "odd",
    [
        lambda c: c.all_gather(value(0)),
        lambda c: c.all_reduce(torch.zeros(4)),
        lambda c: c.all_reduce(value(0).double()),
        lambda c: c.barrier(),
    ],
)
def test_calls_that_do_not_match_fail_on_every_rank(odd: Callable[[Communicator], object]) -> None:
    found = run(3, lambda c: odd(c) if c.rank == 1 else c.all_reduce(value(0)))
    assert all(isinstance(error, RuntimeError) for error in found)
    assert any("do not make the same call" in str(error) for error in found)


def test_a_rank_that_is_gone_fails_the_others() -> None:
    def work(c: Communicator) -> object:
        assert isinstance(c, ThreadCommunicator)
        if c.rank == 0:
            c._group.barrier.abort()  # what a rank's end does
            raise RuntimeError("out of memory")
        return c.all_reduce(value(0))

    assert all(isinstance(error, RuntimeError) for error in run(2, work))


def test_what_was_sent_must_fit() -> None:
    def work(c: Communicator) -> None:
        if c.rank == 0:
            c.send(torch.zeros(2), destination=1)
        else:
            c.recv(torch.zeros(3), source=0)

    _, error = run(2, work)
    assert "rank 1 expects (3,) of torch.float32, rank 0 sent (2,) of torch.float32" in str(error)


@pytest.mark.parametrize("peer", [0, 2, -1])
def test_there_are_no_other_peers(peer: int) -> None:
    first = ThreadCommunicator.group(2)[0]
    for call in (lambda: first.send(value(0), destination=peer), lambda: first.recv(value(0), source=peer)):
        with pytest.raises(RuntimeError, match=f"rank 0 of 2 cannot talk to rank {peer}"):
            call()


def test_a_group_of_one_copies_and_talks_to_nobody() -> None:
    alone: Communicator = SingleRank()
    for result in (alone.all_reduce(value(0)), alone.all_gather(value(0)), alone.broadcast(value(0), source=0)):
        assert torch.equal(result, value(0))
    alone.barrier()
    with pytest.raises(RuntimeError, match="no rank 1 in a group of one"):
        alone.send(value(0), destination=1)
    with pytest.raises(RuntimeError, match="no rank 1 in a group of one"):
        alone.recv(value(0), source=1)
