"""Tier 1, continued: the parts that a platform is made of beside ops and attention.

Pools that go away and come back, the graph runner, streams, seeds, and the group of ranks.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fairlead.errors import ConfigError
from fairlead.interface import TAGS, Communicator, MemoryProfile
from fairlead.layers.context import Step
from fairlead.testing.conformance.subject import Subject

MAX_ASKED = 300  # step sizes for which the graph runner is asked
RANKS_S = 20.0


def pools(s: Subject) -> None:
    """Contents survive `offload`; tensors and their views are the same ones afterwards."""
    a = s.platform.allocator
    for tag in TAGS:
        other = TAGS[1 - TAGS.index(tag)]
        tensor = a.empty((257,), torch.float32, tag=tag)
        view, kept = tensor[5:], torch.arange(257, dtype=torch.float32)
        tensor.copy_(kept)
        neighbour = a.empty((64,), torch.float32, tag=other)
        held, beside = a.allocated_bytes(tag), a.allocated_bytes(other)
        for leave, keeps in ((a.offload, True), (a.discard, False), (a.offload, True)):
            hook = f"allocator.{'offload' if keeps else 'discard'}"
            leave(tag)
            s.expect(a.allocated_bytes(tag) == 0, hook, f"0 bytes of {tag!r} left", a.allocated_bytes(tag))
            s.expect(a.allocated_bytes(other) == beside, hook, f"{other!r} untouched", a.allocated_bytes(other))
            _expect_raises(s, hook, ValueError, f"for {tag!r}, which is away", partial(leave, tag))
            empty = "allocator.empty"
            _expect_raises(
                s, empty, ValueError, f"for {tag!r}, which is away", partial(a.empty, (1,), torch.float32, tag=tag)
            )
            for _ in range(2):  # the second time does nothing
                a.restore(tag)
                now = a.allocated_bytes(tag)
                s.expect(now == held, "allocator.restore", f"{held} bytes of {tag!r} again", now)
            if keeps:
                same = torch.equal(s.to_host(tensor), kept) and torch.equal(s.to_host(view), kept[5:])
                s.expect(same, "allocator.restore", f"the contents of {tag!r} as they were", "others")
            tensor.copy_(kept)
            same = torch.equal(s.to_host(view), kept[5:])
            s.expect(same, "allocator.restore", "views of the same memory as their tensors", "others")
        del tensor, view, neighbour
    hook = "allocator.empty"
    unknown = "no such pool"
    _expect_raises(s, hook, ValueError, f"for the tag {unknown!r}", lambda: a.empty((1,), torch.float32, tag=unknown))


def graph_runner(s: Subject) -> None:
    """Its buckets, and that what it runs is what was asked for, whatever it has captured."""
    p, c = s.platform, s.platform.capabilities
    runner = p.graph_runner()
    hook = "graph_runner"
    buckets = runner.buckets
    if c.graphs:
        s.expect(bool(buckets), f"{hook}.buckets", "some, since capabilities have graphs", "()")
    most = min(c.max_batched_tokens or p.defaults.max_num_batched_tokens, MAX_ASKED)
    for num_tokens in range(1, most + 1):
        for longest in {1, num_tokens}:
            found = runner.bucket(num_tokens, longest)
            what = f"{num_tokens} tokens, the longest chunk of {longest}"
            fits = found is None or (found in buckets and found >= num_tokens)
            s.expect(fits, f"{hook}.bucket", f"None, or a bucket that holds {what}", repr(found))
            must = c.static_shapes and found is None
            s.expect(not must, f"{hook}.bucket", f"a bucket for {what} (capabilities.static_shapes)", "None")
    weight = s.to_device(torch.randn(97, 64, generator=torch.Generator().manual_seed(1)))

    def forward(token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: object) -> torch.Tensor:
        return weight[token_ids_T] * positions_T.unsqueeze(1).to(weight.dtype)

    for size in (buckets[:2] or (1, 7)) * 2:  # each twice: the second may be a replay
        ids, positions = torch.randint(0, 97, (size,)), torch.randint(0, 50, (size,))
        want = s.to_host(weight)[ids] * positions.unsqueeze(1)
        with torch.inference_mode():
            got = runner.run(forward, s.to_device(ids), s.to_device(positions), Step(groups=()))
        s.check_tensor(f"{hook}.run", got, want, f"a step of {size} tokens")
        s.compare(f"{hook}.run", got, want, 1e-6, f"a step of {size} tokens")


def streams(s: Subject) -> None:
    """Work on a stream is done once its event is, and another stream can wait for it."""
    first, second = s.platform.stream(), s.platform.stream()
    x = s.to_device(torch.ones(1000))
    with first:
        y = x + 1
        event = first.record()
    second.wait(event)
    with second:
        z = y + 1
    event.synchronize()
    s.expect(event.query() is True, "stream.record", "an event that is done after synchronize", event.query())
    second.synchronize()
    done = bool((s.to_host(z) == 3).all())
    s.expect(done, "stream.wait", "the first stream's work done before the second's", "values without it")


def seed(s: Subject) -> None:
    """Any 64 bits."""
    for value in (0, 7, 2**63 - 1):
        s.platform.seed(value)


def own_schemes(s: Subject) -> None:
    """`capabilities.quantization` names the schemes of `linear_methods`, no more and no fewer."""
    methods: Any = s.platform.linear_methods()
    named = {scheme for scheme in methods if scheme != "unquantized"}
    said = set(s.platform.capabilities.quantization)
    s.expect(said == named, "capabilities.quantization", f"the schemes of linear_methods {sorted(named)}", sorted(said))


def profile(s: Subject) -> None:
    """The work runs once, and what it raises goes on; the report is a record, or None."""
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        s.to_device(torch.ones(1 << 16)) + 1

    found: Any = s.platform.memory_profile(work)
    s.expect(found is None or isinstance(found, MemoryProfile), "memory_profile", "MemoryProfile or None", repr(found))
    s.expect(len(runs) == 1, "memory_profile", "one run of the work", len(runs))

    def fail() -> None:
        raise ZeroDivisionError

    again = partial(s.platform.memory_profile, fail)
    _expect_raises(s, "memory_profile", ZeroDivisionError, "that the work raised", again)
    swap: Any = s.platform.max_swap_bytes(0)
    is_bytes = swap is None or (type(swap) is int and swap >= 0)
    s.expect(is_bytes, "max_swap_bytes", "a number of bytes, or None", repr(swap))


def ranks(s: Subject) -> None:
    """A group of one; a group of two where the capabilities allow it, else a refusal."""
    alone = s.platform.communicator(0, 1)
    s.expect((alone.rank, alone.world_size) == (0, 1), "communicator", "rank 0 of 1", (alone.rank, alone.world_size))
    _talk(s, alone)
    if s.platform.capabilities.max_world_size == 1:
        _expect_raises(
            s, "communicator", ConfigError, "for two ranks, of max_world_size 1", lambda: s.platform.communicator(0, 2)
        )
        return
    errors: list[BaseException] = []

    def join(rank: int) -> None:
        try:
            assert s.record.spec is not None
            device = s.record.devices[rank % len(s.record.devices)]
            _talk(s, s.record.spec.create(device).communicator(rank, 2))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(RANKS_S)
    if errors:
        raise errors[0]
    s.expect(not any(t.is_alive() for t in threads), "communicator", f"an end within {RANKS_S:g} s", "ranks that wait")


def _talk(s: Subject, c: Communicator) -> None:
    """What every rank says, and what each must hear."""
    size = c.world_size
    values = [torch.arange(6, dtype=torch.float32).view(2, 3) + 10 * rank for rank in range(size)]
    mine = s.to_device(values[c.rank])
    _hear(s, "all_reduce", c.all_reduce(mine), torch.stack(values).sum(0))
    for dim in (0, 1):
        _hear(s, "all_gather", c.all_gather(mine, dim=dim), torch.cat(values, dim=dim))
    for source in range(size):
        _hear(s, "broadcast", c.broadcast(mine, source=source), values[source])
    _hear(s, "all_reduce", mine, values[c.rank])  # nobody has changed what was given
    if size > 1:
        got = s.to_device(torch.zeros(2, 3))
        if c.rank == 0:
            c.send(mine, destination=1)
        else:
            c.recv(got, source=0)
            _hear(s, "recv", got, values[0])
    c.barrier()


def _hear(s: Subject, what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    hook = f"communicator.{what}"
    found = s.to_host(s.check_tensor(hook, got, want, "two rows of three"))
    s.expect(torch.equal(found, want), hook, want.tolist().__repr__(), found.tolist())


def _expect_raises(s: Subject, hook: str, kind: type[Exception], when: str, call: Callable[[], object]) -> None:
    try:
        got: object = call()
    except kind:
        return
    except Exception as error:
        got = type(error).__name__
    s.fail(hook, f"{kind.__name__} {when}", repr(got) if not isinstance(got, str) else got)


CHECKS: Sequence[tuple[str, str, Callable[[Subject], None]]] = (
    ("allocator: pools go and come back", "allocator", pools),
    ("graph runner", "graph_runner", graph_runner),
    ("streams and events", "stream", streams),
    ("seed", "seed", seed),
    ("memory profile and swap", "memory_profile", profile),
    ("schemes of its own", "linear_methods", own_schemes),
    ("ranks", "communicator", ranks),
)
