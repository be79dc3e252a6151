"""Engines with swap space give the tokens that others give, and take up preempted requests where they left off."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairlead import LLM, RequestOutput, SamplingParams, StructuredOutputParams
from fairlead.engine import builder
from fairlead.engine.model_runner import ModelRunner, PreparedStep
from fairlead.engine.planner import EnginePlan
from fairlead.scheduling.batch import ScheduledBatch
from fairlead.scheduling.host_tier import SwapCosts
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama

BLOCK_SIZE, MAX_MODEL_LEN, NAN_TOKEN = 8, 96, 99
NUM_BLOCKS = 16  # a tenth of what all requests together take; the longest takes 12
PROMPTS = [[(7 * i + j * j) % 90 for j in range(5 + 4 * i)] for i in range(12)]
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"seed": 1},
    {"seed": 2, "n": 3, "top_p": 0.9},
    {"temperature": 0, "repetition_penalty": 1.3},
]


@pytest.fixture(scope="module", params=["full", "window and full"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    if request.param == "full":
        return write_tiny_llama(directory, seed=3)
    settings = {
        "use_sliding_window": True,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return write_tiny_checkpoint(directory, "qwen2", seed=3, settings=settings)


@pytest.fixture
def decide(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Replaces what is measured: seconds of a block there and back, and of any copying back; a token takes one."""

    def choose(block_s: float, overhead_s: float) -> None:
        def measure(plan: EnginePlan, runner: ModelRunner) -> SwapCosts:
            each = (block_s / 2 / len(plan.cache_groups),) * len(plan.cache_groups)
            return SwapCosts(out_s=each, in_s=each, overhead_s=overhead_s, token_s=1.0)

        monkeypatch.setattr(builder.swap_costs, "measure", measure)

    return choose


def make_llm(model: Path, **settings: Any) -> LLM:
    shared = {"skip_tokenizer_init": True, "block_size": BLOCK_SIZE, "max_model_len": MAX_MODEL_LEN, "dtype": "float32"}
    return LLM(str(model), **{**shared, **settings})


def params(**more: Any) -> list[SamplingParams]:
    settings = {"max_tokens": 32, "detokenize": False, "ignore_eos": True, **more}
    return [SamplingParams(**{**settings, **PARAMS[i % len(PARAMS)]}) for i in range(len(PROMPTS))]


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[list(o.token_ids) for o in output.outputs] for output in outputs]


def generate(llm: LLM) -> list[list[list[int]]]:
    found = tokens(llm.generate(PROMPTS, params(), use_tqdm=False))
    llm.engine.scheduler.check_integrity()
    return found


def count_tokens(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets the number of tokens of every step."""
    counts: list[int] = []
    prepare = llm.engine._runner.prepare

    def counting(batch: ScheduledBatch) -> PreparedStep:
        counts.append(batch.num_tokens)
        return prepare(batch)

    monkeypatch.setattr(llm.engine._runner, "prepare", counting)
    return counts


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[list[int]]]:
    """What an engine with memory for all gives."""
    found = generate(make_llm(model))
    assert len({tuple(ids) for output in found for ids in output}) == sum(map(len, found))
    return found


@pytest.mark.parametrize(
    ("caching", "chunk", "is_async"), [(True, 2048, False), (True, 13, True), (False, 13, False), (False, 2048, True)]
)
def test_outputs_are_those_without_swap_space(
    model: Path,
    expected: list[list[list[int]]],
    caching: bool,
    chunk: int,
    is_async: bool,
    decide: Callable[[float, float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Greedy, seeded and forked requests, on a tenth of the memory, whether blocks come back or are computed."""
    shared = {"enable_prefix_caching": caching, "max_num_batched_tokens": chunk, "async_scheduling": is_async}
    computed, few = {}, 0.0
    for name in ("without", "free", "few blocks", "dear"):
        decide(0.0, 1e9 if name == "dear" else 0.0)
        swap_space = {"without": 0.0, "few blocks": few}.get(name, 0.01)
        llm = make_llm(model, num_blocks=NUM_BLOCKS, swap_space=swap_space, **shared)
        few = 8.5 * llm.info.kv_cache_bytes / NUM_BLOCKS / 2**30
        counts = count_tokens(llm, monkeypatch)
        assert generate(llm) == expected, name
        stats = llm.engine.stats()
        assert stats.num_preemptions > 0
        assert (stats.num_blocks_swapped_out > 0) == (name != "without")
        assert (stats.num_blocks_swapped_in > 0) == (name in ("free", "few blocks"))
        assert stats.kv_cache_usage == 0
        computed[name] = sum(counts)
        llm.close()
    assert computed["free"] < computed["dear"]
    assert computed["dear"] <= computed["without"]


def test_a_cold_prefix_comes_back(model: Path, decide: Callable[[float, float], None]) -> None:
    decide(0.0, 0.0)
    llm = make_llm(model, num_blocks=NUM_BLOCKS, swap_space=0.01)
    greedy = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    first = llm.generate([PROMPTS[11]], greedy, use_tqdm=False)[0]
    llm.generate(PROMPTS[:11], greedy, use_tqdm=False)
    before = llm.engine.stats().num_blocks_swapped_in
    again = llm.generate([PROMPTS[11]], greedy, use_tqdm=False)[0]
    assert llm.engine.stats().num_blocks_swapped_in > before
    assert again.num_cached_tokens == (len(PROMPTS[11]) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert tokens([again]) == tokens([first])
    llm.reset_prefix_cache()
    once_more = llm.generate([PROMPTS[11]], greedy, use_tqdm=False)[0]
    assert once_more.num_cached_tokens == 0
    assert tokens([once_more]) == tokens([first])


def test_a_grammar_goes_on_where_it_was(decide: Callable[[float, float], None]) -> None:
    decide(0.0, 0.0)
    spec = StructuredOutputParams(regex="([0-9][a-f]){30}")
    asked = [SamplingParams(seed=i, n=2, max_tokens=70, structured_outputs=spec) for i in range(4)]
    roomy = LLM("demo", max_model_len=96, dtype="float32")
    tight = LLM("demo", max_model_len=96, dtype="float32", num_blocks=12, block_size=8, swap_space=0.1)
    expected, found = (llm.generate(["Hi"] * 4, asked, use_tqdm=False) for llm in (roomy, tight))
    assert tokens(found) == tokens(expected)
    assert all(re.fullmatch("([0-9][a-f]){30}", o.text) for output in found for o in output.outputs)
    assert tight.engine.stats().num_blocks_swapped_in > 0
    for llm in (roomy, tight):
        llm.close()


class FaultError(Exception):
    """What the platform raises."""


@pytest.mark.parametrize("method", ["copy_to_host", "copy_from_host"])
def test_a_copy_that_fails_leaves_nothing_behind(
    model: Path,
    expected: list[list[list[int]]],
    method: str,
    decide: Callable[[float, float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the failed copies were to bring is in no cache."""
    decide(0.0, 0.0)
    llm = make_llm(model, num_blocks=NUM_BLOCKS, swap_space=0.01)

    def fail(*args: Any) -> None:
        raise FaultError

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine._runner.backends[-1], method, fail)
        with pytest.raises(FaultError):
            generate(llm)
    assert not llm.engine.has_work
    assert not any(tier.blocks for tier in llm.engine.scheduler.blocks.tiers)
    llm.engine.scheduler.check_integrity()
    assert generate(llm) == expected


def test_nan_does_not_come_back_from_the_host(tmp_path: Path, decide: Callable[[float, float], None]) -> None:
    """N6, with chunks so small that blocks of a bad prompt are evicted before its NaN shows."""
    write_tiny_llama(tmp_path, seed=1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][NAN_TOKEN] = torch.nan
    tensors["lm_head.weight"][NAN_TOKEN] = 0.0  # so that the token is never the best one
    save_file(tensors, tmp_path / "model.safetensors")
    decide(0.0, 0.0)
    expected = generate(make_llm(tmp_path))
    llm = make_llm(tmp_path, num_blocks=NUM_BLOCKS, swap_space=0.01, max_num_batched_tokens=13)
    bad = [[NAN_TOKEN, *prompt] for prompt in PROMPTS]
    mixed = [prompt for pair in zip(bad, PROMPTS, strict=True) for prompt in pair]
    mixed_params = [p for good in params() for p in (good, good)]
    found = llm.generate(mixed, mixed_params, use_tqdm=False)
    assert {o.finish_reason for output in found[::2] for o in output.outputs} == {"error"}
    assert tokens(found[1::2]) == expected
    assert generate(llm) == expected
    assert llm.engine.stats().num_blocks_swapped_in > 0
    assert llm.engine.stats().num_nan_sequences == sum(len(output.outputs) for output in found[::2])


def test_costs_are_measured_and_told(model: Path) -> None:
    llm = make_llm(model, num_blocks=64, swap_space=0.01)
    plan, runner = builder.plan_engine(llm.config), llm.engine._runner
    runner.allocate_host_cache([group.num_host_blocks for group in plan.cache_groups])  # if they did not pay
    costs = builder.swap_costs.measure(plan, runner)
    num_groups = len(plan.cache_groups)
    assert len(costs.in_s) == len(costs.out_s) == num_groups
    assert min(*costs.in_s, *costs.out_s, costs.token_s) > 0
    assert costs.overhead_s >= 0
    text = builder.swap_costs.describe(
        SwapCosts(out_s=(0.5, 1.0), in_s=(0.25, 1.0), overhead_s=9.0, token_s=0.001), block_size=8
    )
    assert text == "2750.000 ms to copy a block out and back, 8.000 ms to compute it"
    assert re.fullmatch(r"[0-9.]+ ms to copy a block out and back, [0-9.]+ ms to compute it.*", llm.info.swap_costs)
    llm.close()


@pytest.mark.parametrize(("block_s", "is_used"), [(7.9, True), (8.1, False)])
def test_swap_space_that_never_pays_is_given_back(
    model: Path, block_s: float, is_used: bool, decide: Callable[[float, float], None]
) -> None:
    """A block of 8 tokens takes 8 s to compute."""
    decide(block_s, 0.0)
    llm = make_llm(model, num_blocks=64, swap_space=0.01)
    assert (llm.info.swap_bytes > 0) == is_used
    assert ("is not used, since that never pays" in llm.info.swap_costs) != is_used
    assert (len(llm.engine._runner.host_caches) > 0) == is_used
    llm.close()
