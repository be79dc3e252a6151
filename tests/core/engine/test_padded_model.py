"""A graph runner with buckets: every step and every row of logits has one of its sizes, and tokens stay the same."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead import LLM, SamplingParams
from fairlead.engine import planner
from fairlead.errors import ConfigError
from fairlead.interface import Device, GraphRunner
from fairlead.layers.embedding import OutputHead
from fairlead.ops.graph import PassThrough, smallest_bucket
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_cpu.platform import CpuPlatform

BUCKETS: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
PROMPTS = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (1, 5, 40, 17, 2)]


class Static:
    """Notes the sizes that it runs."""

    buckets = BUCKETS

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        return smallest_bucket(BUCKETS, num_tokens)

    def run(
        self, forward: Callable[..., torch.Tensor], token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: object
    ) -> torch.Tensor:
        assert len(token_ids_T) == len(positions_T)
        self.sizes.append(len(token_ids_T))
        return forward(token_ids_T, positions_T, step)


class Platform(CpuPlatform):
    """The CPU with a graph runner that the test chooses."""

    def __init__(self) -> None:
        super().__init__(Device(name="cpu:0", description="test", memory_bytes=2**33))
        self.runner: GraphRunner = PassThrough()

    def graph_runner(self) -> GraphRunner:
        return self.runner


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Platform:
    """What every engine of the test runs on."""
    platform = Platform()
    monkeypatch.setattr(planner.plugins, "create", lambda record, device: platform)
    return platform


def generate(model: Path, backend: str, params: SamplingParams, **settings: Any) -> list[Any]:
    llm = LLM(
        str(model),
        platform="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        attention_backend=backend,
        max_num_batched_tokens=32,
        **settings,
    )
    outputs = llm.generate(PROMPTS, params)
    return [(o.outputs[0].token_ids, o.outputs[0].logprobs is None, o.prompt_logprobs is None) for o in outputs]


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=4, temperature=0.0, logprobs=2, prompt_logprobs=1, ignore_eos=True),
    ],
    ids=["greedy", "seeded", "logprobs"],
)
def test_tokens_do_not_depend_on_padding(
    tmp_path: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch, backend: str, params: SamplingParams
) -> None:
    model = write_tiny_llama(tmp_path)
    settings = {"num_blocks": 24, "max_model_len": 128}  # so few that sequences are preempted
    expected = generate(model, backend, params, **settings)
    head_rows = set()
    forward = OutputHead.forward

    def noted(head: OutputHead, hidden_SE: torch.Tensor) -> torch.Tensor:
        head_rows.add(len(hidden_SE))
        return forward(head, hidden_SE)

    monkeypatch.setattr(OutputHead, "forward", noted)
    runner = Static()
    platform.runner = runner
    assert generate(model, backend, params, **settings) == expected
    assert set(runner.sizes) <= set(BUCKETS)
    assert head_rows <= set(BUCKETS)


def test_every_bucket_runs_before_the_first_request(tmp_path: Path, platform: Platform) -> None:
    runner = platform.runner = Static()
    LLM(str(write_tiny_llama(tmp_path)), platform="cpu", skip_tokenizer_init=True, max_num_batched_tokens=32)
    assert runner.sizes[-len(BUCKETS) :] == list(reversed(BUCKETS))  # the memory of the largest serves all


class Decodes(Static):
    """Pads decodes alone."""

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        return smallest_bucket(BUCKETS, num_tokens) if max_query_len == 1 else None


def test_buckets_that_no_step_can_have_are_left_out(tmp_path: Path, platform: Platform) -> None:
    model, settings = str(write_tiny_llama(tmp_path)), {"platform": "cpu", "skip_tokenizer_init": True}
    runner = platform.runner = Decodes()
    LLM(model, max_num_seqs=3, **settings)
    assert runner.sizes[-3:] == [4, 2, 1]
    runner = platform.runner = Static()
    LLM(model, max_num_seqs=3, max_num_batched_tokens=9, **settings)
    assert runner.sizes[-5:] == [16, 8, 4, 2, 1]


def test_eager_steps_on_demand(tmp_path: Path, platform: Platform) -> None:
    model = str(write_tiny_llama(tmp_path))
    runner = platform.runner = Static()
    LLM(model, platform="cpu", skip_tokenizer_init=True, enforce_eager=True)
    assert runner.sizes == []
    platform.capabilities = dataclasses.replace(platform.capabilities, static_shapes=True)
    with pytest.raises(ConfigError, match=r"enforce_eager \(it runs steps of its buckets' sizes alone\)"):
        LLM(model, platform="cpu", skip_tokenizer_init=True, max_num_batched_tokens=32, enforce_eager=True)


def test_padding_has_a_block_of_its_own(tmp_path: Path, platform: Platform) -> None:
    model = write_tiny_llama(tmp_path)
    settings: dict[str, Any] = {"platform": "cpu", "skip_tokenizer_init": True, "max_num_batched_tokens": 32}
    for runner, more in ((PassThrough(), 0), (Static(), 1)):
        platform.runner = runner
        llm = LLM(str(model), num_blocks=40, dtype="float32", **settings)
        held = platform.allocator.allocated_bytes("kv_cache")
        assert held == (40 + more) * 16 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, kv-heads, head size
        assert llm.engine.info.num_blocks == 40
        llm.engine.close()
        del llm


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (3, 4), (32, 32), (33, None)])
def test_the_smallest_bucket_that_holds_them(size: int, expected: int | None) -> None:
    assert smallest_bucket(BUCKETS, size) == expected
