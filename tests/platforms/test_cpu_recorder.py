"""Recorded steps: the same bits as the calls that they stand for, and none where something else computes."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairlead.config import EngineConfig
from fairlead.engine.engine import EngineCore
from fairlead.request import Request, SamplingParams
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_cpu import native, recorder
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.arena import Arena
from fairlead_cpu.linear import NativeLinear
from fairlead_cpu.recorder import StepRecorder

KERNELS = native.kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="fairlead-cpu was built without kernels")
NO_ATTENTION: Any = SimpleNamespace(groups=())
Forward = Callable[[torch.Tensor, torch.Tensor, object], torch.Tensor]


@pytest.fixture
def forward() -> Forward:
    """Ten linear layers, which take the token ids for a row of numbers."""
    assert KERNELS is not None
    method = NativeLinear("unquantized", KERNELS, HostAllocator())
    generator = torch.Generator().manual_seed(0)
    layers = [method.pack({"weight": torch.randn(64, 32, generator=generator)}) for _ in range(10)]

    def run(x: torch.Tensor, positions: torch.Tensor, step: object) -> torch.Tensor:
        for layer in layers:
            x = method.apply(x, layer, None)[:, 16:48]
        return x

    return run


def make(generation: Callable[[], int] = lambda: 0) -> StepRecorder:
    assert KERNELS is not None
    return StepRecorder(KERNELS, generation)


def run(made: StepRecorder, forward: Forward, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return made.run(forward, x, torch.zeros(len(x), dtype=torch.int64), NO_ATTENTION).clone()


@pytest.mark.parametrize("num_rows", [1, 3, 64])
def test_a_replay_gives_the_same_bits_on_other_inputs(forward: Forward, num_rows: int) -> None:
    made, calls = make(), 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(*arguments)

    for _ in range(5):
        x = torch.randn(num_rows, 32)
        assert torch.equal(run(made, counted, x), forward(x, x, None))
    assert calls == 2, "the first is run, the second recorded"
    assert not made.foreign


def test_larger_steps_are_not_recorded(forward: Forward) -> None:
    made = make()
    for _ in range(3):
        x = torch.randn(65, 32)
        assert torch.equal(run(made, forward, x), forward(x, x, None))
    assert not made._recordings


def test_only_so_many_sizes_are_kept(forward: Forward, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_MAX_RECORDINGS", 2)
    made = make()
    for num_rows in (1, 1, 2, 2, 1, 3, 3):
        run(made, forward, torch.randn(num_rows, 32))
    assert list(made._recordings) == [1, 3]


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("add", lambda x: x + 1),
        ("mul_", lambda x: x.mul_(2)),
        ("contiguous", lambda x: x.t().contiguous().t()),
        ("item", lambda x: x if x[0, 0].item() != 1e9 else x * 2),
        ("__setitem__", lambda x: (x.__setitem__(0, 0.5), x)[1]),
        ("split", lambda x: torch.cat(x.split(16, dim=1), dim=1)),
    ],
)
def test_whatever_else_computes_or_looks_keeps_a_step_from_being_recorded(
    forward: Forward, name: str, foreign: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    made = make()

    def mixed(x: torch.Tensor, positions: torch.Tensor, step: object) -> torch.Tensor:
        return foreign(forward(x, positions, step))

    for _ in range(4):
        x = torch.randn(3, 32)
        assert torch.equal(run(made, mixed, x), mixed(x, x, None))
    assert made.foreign
    assert name in made.foreign or name == "split"
    assert not any(made._recordings.values())


def test_memory_that_moved_ends_all_recordings() -> None:
    assert KERNELS is not None
    allocator = HostAllocator()
    method = NativeLinear("unquantized", KERNELS, allocator)
    layer = method.pack({"weight": torch.randn(64, 32)})
    made = make(lambda: allocator.num_restores)

    def forward(x: torch.Tensor, positions: torch.Tensor, step: object) -> torch.Tensor:
        return method.apply(x, layer, None)

    x = torch.randn(2, 32)
    expected = [run(made, forward, x) for _ in range(3)][-1]
    allocator.offload("weights")
    allocator.restore("weights")
    assert [torch.equal(run(made, forward, x), expected) for _ in range(3)] == [True] * 3


def test_an_arena_uses_memory_again_once_all_views_are_gone() -> None:
    arena = Arena()
    first = arena.empty((4, 16), torch.float32)
    address, part = first.data_ptr(), first[1:2]
    del first
    second = arena.empty((4, 16), torch.float32)
    assert second.data_ptr() != address
    del part
    third = arena.empty((2, 16), torch.bfloat16)
    assert (third.data_ptr(), third.shape, third.dtype) == (address, (2, 16), torch.bfloat16)
    del second, third
    assert len(arena._free) == 1
    assert arena.empty((5_000_000,), torch.uint8).nbytes == 5_000_000
    assert arena.empty((0, 3), torch.float32).shape == (0, 3)


RECORDED = ("llama", "llama int8", "llama int4", "mixtral")


@pytest.mark.parametrize("model", [*RECORDED, "gemma3_text", "qwen3", "phi", "gpt2"])
def test_an_engine_gives_the_same_tokens_with_recorded_steps(tmp_path: Path, model: str) -> None:
    """Sequences come and go, so that steps of many sizes are recorded and replayed."""
    model_type, _, quantization = model.partition(" ")
    if model_type == "llama":
        write_tiny_llama(tmp_path, seed=1)
    else:
        write_tiny_checkpoint(tmp_path, model_type)
    found = []
    for is_recorded in (True, False):
        settings = {"model": str(tmp_path), "num_blocks": 200, "dtype": "bfloat16"}
        engine = EngineCore(EngineConfig.of(**settings, quantization=quantization or None))
        graph_runner = engine._runner.padded.graph_runner
        assert isinstance(graph_runner, StepRecorder)
        if not is_recorded:
            graph_runner.foreign = {"the test"}
        for i in range(6):
            params = SamplingParams(temperature=0, max_tokens=6 + 3 * i, ignore_eos=True)
            prompt = tuple((7 * i + 3 * j) % 90 for j in range(3 + 5 * i))
            engine.add_request(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
        tokens: dict[str, list[int]] = {}
        while engine.has_work:
            for delta in engine.step():
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        found.append(tokens)
        if is_recorded and model in RECORDED:
            assert not graph_runner.foreign
            assert any(graph_runner._recordings.values())
        engine.close()
    assert found[0] == found[1]
