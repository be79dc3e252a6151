"""The step by which memory is measured: as large as any, on every kind of layer, and without traces."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead.config import EngineConfig
from fairlead.engine import builder, memory_profile
from fairlead.engine.padded_model import PaddedModel
from fairlead.engine.planner import Negotiated
from fairlead.layers.context import Step
from fairlead.scheduling.block_manager import CacheGroup, blocks_per_sequence
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama


@given(
    longest=st.integers(2, 3000),
    num_tokens=st.integers(1, 300),
    block_size=st.sampled_from([1, 8, 16, 128]),
    windows=st.lists(st.none() | st.integers(1, 3000), min_size=1, max_size=2),
)
def test_a_step_has_the_longest_context_and_so_many_tokens(
    longest: int, num_tokens: int, block_size: int, windows: list[int | None]
) -> None:
    settings = Negotiated(
        dtype="float32",
        block_size=block_size,
        max_model_len=longest,
        max_num_seqs=300,
        max_num_batched_tokens=num_tokens,
        attention_backend="sdpa",
        kv_dtype="auto",
        device_memory_utilization=0.5,
        async_scheduling=False,
    )
    num_blocks = [blocks_per_sequence(window, longest, block_size, num_tokens) for window in windows]
    groups = tuple(CacheGroup(num_blocks=1, sliding_window=window) for window in windows)
    plan: Any = SimpleNamespace(settings=settings, cache_groups=groups)
    chunks = memory_profile.step_of(plan, num_blocks, num_tokens).chunks
    lengths = [len(chunk.token_ids) for chunk in chunks]
    assert sum(lengths) == num_tokens
    assert (chunks[0].start + lengths[0], lengths[0]) == (longest, 1)
    for chunk, length in zip(chunks, lengths, strict=True):
        assert chunk.start + length <= longest
        for (first, blocks), window, most in zip(chunk.block_tables, windows, num_blocks, strict=True):
            seen = 0 if window is None else max(chunk.start - window + 1, 0)
            assert first == seen // block_size
            assert (
                (first + len(blocks) - 1) * block_size <= chunk.start + length - 1 < (first + len(blocks)) * block_size
            )
            assert len(set(blocks)) == len(blocks) <= most
            assert set(blocks) <= set(range(most))


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral", "deepseek_v3"])
def test_it_runs_on_every_kind_of_layer(tmp_path: Path, model_type: str) -> None:
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 8, "max_model_len": 100}
    built = builder.build(EngineConfig.of(model=str(write_tiny_checkpoint(tmp_path, model_type)), **settings))
    assert built.plan.info.activations_measured


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_measured_step_is_no_smaller_than_its_shapes(tmp_path: Path, backend: str) -> None:
    write_tiny_llama(tmp_path, hidden_size=256, vocab_size=20_000, num_heads=4)
    config = EngineConfig.of(model=str(tmp_path), attention_backend=backend, max_num_seqs=128, num_blocks=32)
    planned = builder.build(config)
    plan, runner = planned.plan, planned.runner
    least = plan.info.activation_bytes
    measured = memory_profile.measure_activations(plan, runner)
    assert measured is not None
    assert least <= measured <= 20 * least
    assert plan.platform.allocator.allocated_bytes("kv_cache") == 0
    again = memory_profile.measure_activations(plan, runner)
    assert again is not None
    assert again <= 1.5 * measured


def test_the_graph_runner_sees_no_cache_but_the_engines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of a step on another cache would be replayed into memory that is no longer its own."""
    seen: list[object] = []
    hidden, measure = PaddedModel.hidden, memory_profile.measure_activations
    measured = []

    def spy(self: PaddedModel, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        seen.extend(cache for group in step.groups for cache in group.kv_caches)
        return hidden(self, token_ids_T, positions_T, step)

    def noted(*args: Any) -> int | None:
        measured.append(measure(*args))
        return measured[-1]

    monkeypatch.setattr(PaddedModel, "hidden", spy)
    monkeypatch.setattr(builder, "measure_activations", noted)
    write_tiny_llama(tmp_path)
    built = builder.build(EngineConfig.of(model=str(tmp_path), max_model_len=100, max_num_batched_tokens=128))
    assert measured[0] is not None
    plan, runner = built.plan, built.runner
    runner.forward(runner.prepare(memory_profile.step_of(plan, [g.num_blocks for g in plan.cache_groups], 32)))
    own = [cache for caches in runner.kv_caches for cache in caches]
    assert seen
    assert all(any(cache is mine for mine in own) for cache in seen)
