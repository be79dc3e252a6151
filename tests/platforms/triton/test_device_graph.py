"""Decode steps are captured once per bucket and replayed; everything else passes through."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from fake_device import FakeModule, fake_runtime

from fairlead_triton.device.allocator import DeviceAllocator
from fairlead_triton.device.graph import BUCKETS, GraphCapturer


@dataclass
class Plan:
    """Reads one number at an address that stays, as a backend's plan reads its words."""

    static: torch.Tensor
    value: float
    replayable: bool = True

    def load(self) -> None:
        self.static.fill_(self.value)


@dataclass(frozen=True, kw_only=True)
class Group:
    plan: object


@dataclass(frozen=True, kw_only=True)
class Step:
    groups: tuple[Group, ...]


@dataclass
class Model:
    """ids * weight + positions + what the plan says; counts its calls."""

    weight: torch.Tensor
    asks: bool = False
    calls: list[int] = field(default_factory=list)

    def __call__(self, ids_T: torch.Tensor, positions_T: torch.Tensor, step: Any) -> torch.Tensor:
        self.calls.append(len(ids_T))
        hidden_TE = ids_T.unsqueeze(1) * self.weight + positions_T.unsqueeze(1)
        for group in step.groups:
            hidden_TE = hidden_TE + group.plan.static
        if self.asks and float(hidden_TE.sum()) < 0:
            return -hidden_TE
        return hidden_TE


class Fixture:
    def __init__(self, **settings: Any) -> None:
        self.module = FakeModule()
        self.runtime = fake_runtime(self.module, **settings)
        self.allocator = DeviceAllocator(self.runtime)
        self.runner = GraphCapturer(self.runtime, self.allocator, (2, 4, 8))
        self.model = Model(torch.tensor([1.0, 2.0, 3.0]))
        self.static = torch.zeros(3)

    def run(self, ids: list[int], value: float = 0.0, **changes: Any) -> torch.Tensor:
        ids_T = torch.tensor(ids)
        step = Step(groups=(Group(plan=replace(Plan(self.static, value), **changes)),))
        got = self.runner.run(self.model, ids_T, ids_T * 10, step)
        want = ids_T.unsqueeze(1) * self.model.weight + ids_T.unsqueeze(1) * 10 + value
        assert torch.equal(got, want)
        return got


def test_a_bucket_is_captured_once_and_replayed_with_new_inputs() -> None:
    f = Fixture()
    f.run([1, 2, 3, 4], 5.0)
    assert f.model.calls == [4, 4]  # once to warm up, once to capture
    f.run([9, 8, 7, 6], -2.5)
    f.run([0, 0, 0, 1], 7.0)
    assert f.model.calls == [4, 4]
    assert [graph.num_replays for graph in f.module.graphs] == [3]


def test_captures_share_their_inputs_and_their_pool() -> None:
    f = Fixture()
    for size in (8, 4, 2):
        f.run(list(range(size)), 1.0)
    assert len({graph.pool for graph in f.module.graphs}) == 1
    for size in (2, 8, 4, 2):
        f.run(list(range(5, 5 + size)), float(size))
    assert [graph.num_replays for graph in f.module.graphs] == [2, 2, 3]
    reads = [{t.untyped_storage().data_ptr() for _, args, _, _ in g.tape for t in args if isinstance(t, torch.Tensor)}
             for g in f.module.graphs]  # fmt: skip
    assert len(set.intersection(*reads)) >= 3  # ids, positions and the plan's number


def test_decodes_are_padded_to_the_next_bucket_and_prompts_are_not() -> None:
    runner = Fixture().runner
    assert [runner.bucket(n, 1) for n in (1, 2, 3, 8, 9)] == [2, 2, 4, 8, None]
    assert [runner.bucket(n, n) for n in (2, 3, 8)] == [None, None, None]
    assert list(BUCKETS) == sorted(set(BUCKETS))


@pytest.mark.parametrize("ids", [[1, 2, 3], list(range(9))])
def test_other_sizes_run_as_they_come(ids: list[int]) -> None:
    f = Fixture()
    for _ in range(2):
        f.run(ids, 0.0)
    assert f.model.calls == [len(ids)] * 2
    assert f.module.graphs == []


def test_a_prompt_of_a_buckets_size_is_not_captured() -> None:
    f = Fixture()
    f.static.fill_(3.0)
    f.run([1, 2, 3, 4], 3.0, replayable=False)
    assert f.module.graphs == []


def test_plans_without_a_replay_run_as_they_come() -> None:
    f = Fixture()
    ids_T = torch.tensor([1, 2])
    step = Step(groups=(Group(plan=type("Foreign", (), {"static": torch.ones(3)})()),))
    for _ in range(2):
        assert f.runner.run(f.model, ids_T, ids_T, step)[0].tolist() == [3.0, 4.0, 5.0]
    assert f.module.graphs == []


@pytest.mark.parametrize("moves", ["allocation", "offload", "another model"])
def test_a_capture_lives_no_longer_than_its_addresses(moves: str) -> None:
    f = Fixture()
    weight = f.allocator.empty((3,), torch.float32, tag="weights")
    weight.copy_(f.model.weight)
    f.model.weight = weight
    f.run([1, 2], 1.0)
    if moves == "allocation":
        kept = f.allocator.empty((3,), torch.float32, tag="kv_cache")
        assert kept.shape == (3,)
    elif moves == "offload":
        f.allocator.offload("weights")
        assert f.runner._captures == {}  # the graphs' own memory is free while the engine sleeps
        f.allocator.restore("weights")
    else:
        f.model = Model(weight)
    f.run([3, 4], 2.0)
    assert len(f.module.graphs) == 2
    f.run([5, 6], 3.0)
    assert [graph.num_replays for graph in f.module.graphs] == [1, 2]


def test_a_model_that_asks_in_its_midst_runs_as_it_comes_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    f = Fixture()
    f.model.asks = True
    with caplog.at_level(logging.WARNING, "fairlead.graphs"):
        for value in (1.0, 2.0):
            f.run([1, 2], value)
    [record] = caplog.records
    text = "steps of 2 rows are not captured as a graph: operation not permitted when stream is capturing"
    assert record.getMessage() == text


def test_without_graphs_there_are_no_buckets() -> None:
    f = Fixture(graphs=False)
    assert f.runner.buckets == ()
    assert f.runner.bucket(1, 1) is None
    f.run([1, 2], 0.0)


def test_what_is_captured_has_not_run() -> None:
    """Of the fake itself: a result is not there before the replay."""
    module = FakeModule()
    graph, x = module.new_graph(), torch.ones(2)
    with module.capture(graph, None, module.Stream(0)):
        y = x + 1
    assert bool(y.isnan().all())
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [5.0, 5.0]
