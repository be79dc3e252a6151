"""N2 to N6 and N13: the tokens of a request depend on the request alone. In float32, token for token.

Each of two models: one with full attention, one with full and sliding-window attention. The plain engine schedules
steps one by one, the others asynchronously where nothing else is said.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairlead import LLM, RequestOutput, SamplingParams
from fairlead.engine.model_runner import PreparedStep
from fairlead.engine.planner import number_layers
from fairlead.interface import AttentionMetadata
from fairlead.scheduling.batch import CopyKind, ScheduledBatch
from fairlead.testing.equivalence import (
    BLOCK_SIZE,
    MODELS,
    VOCAB_SIZE,
    free_copies,
    generate,
    make_llm,
    num_partial_chunks,
    params_of,
    prompts_of,
    share_distinct,
    tokens_of,
    watch,
)

LENGTHS = (1, 15, 16, 17, 33, 47, 70, 90)
TOLERANCE = 1e-4  # of log-probabilities


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param))


def check_prompt_logprobs(found: RequestOutput, expected: RequestOutput) -> None:
    assert found.prompt_logprobs is not None
    assert expected.prompt_logprobs is not None
    for a, b in itertools.zip_longest(found.prompt_logprobs[1:], expected.prompt_logprobs[1:]):
        assert list(a) == list(b)
        assert [x.logprob for x in a.values()] == pytest.approx([x.logprob for x in b.values()], abs=TOLERANCE)


def test_the_outputs_vary(model: Path) -> None:
    """Or none of the tests below could fail."""
    tokens = tokens_of(generate(make_llm(model), prompts_of(*LENGTHS), params_of(64)))
    assert share_distinct(tokens) >= 0.5
    assert len({ids for sequences in tokens for ids in sequences}) == sum(map(len, tokens))


def test_n2_alone_or_in_any_batch_in_any_order(model: Path, count: Callable[..., int]) -> None:
    plain, llm = make_llm(model), make_llm(model, async_scheduling=True)
    prompts, params = prompts_of(*LENGTHS), params_of(count(16, full=100))
    alone = [tokens_of(generate(plain, [p], s))[0] for p, s in zip(prompts, params, strict=True)]
    rng = np.random.default_rng(2)
    for _ in range(count(4, full=100)):
        order = rng.permutation(len(prompts))[: rng.integers(2, len(prompts) + 1)]
        strangers = prompts_of(*rng.integers(1, 100, 3).tolist(), seed=int(rng.integers(2**31)))
        first = int(rng.integers(4))
        crowd = [*strangers[:first], *(prompts[i] for i in order), *strangers[first:]]
        stranger = SamplingParams(max_tokens=20, detokenize=False)
        asked = [*[stranger] * len(strangers[:first]), *(params[i] for i in order)]
        asked += [stranger] * (len(crowd) - len(asked))
        found = tokens_of(generate(llm, crowd, asked))[len(strangers[:first]) :][: len(order)]
        assert found == [alone[i] for i in order]


def test_n3_a_prompt_in_chunks_or_whole(model: Path, count: Callable[..., int]) -> None:
    B = BLOCK_SIZE
    sizes = [1, 2, B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1, *range(3, count(3, full=4 * B))]
    prompts = prompts_of(*LENGTHS)
    params = params_of(count(6, full=64), prompt_logprobs=2)
    whole = generate(make_llm(model, max_num_batched_tokens=1024), prompts, params)
    for size in sizes:
        llm = make_llm(model, max_num_batched_tokens=size, max_num_seqs=16, async_scheduling=True)
        steps = watch(llm)
        found = generate(llm, prompts, params)
        assert max(step.num_tokens for step in steps) <= size
        assert num_partial_chunks(steps) >= sum(LENGTHS) // size - len(LENGTHS)
        assert tokens_of(found) == tokens_of(whole), f"in chunks of {size}"
        for a, b in zip(found, whole, strict=True):
            check_prompt_logprobs(a, b)
        llm.close()


@pytest.mark.parametrize("length", [2 * BLOCK_SIZE, 3 * BLOCK_SIZE + 5])
def test_n4_a_prefix_hit_or_a_cold_prompt(model: Path, length: int, count: Callable[..., int]) -> None:
    """Another prompt has left its first tokens in the cache: none, around a block's edge, two blocks, or all."""
    B = BLOCK_SIZE
    (prompt,) = prompts_of(length)
    params = params_of(count(6, full=100))[:: count(2, full=1)]
    with_logprobs = replace(params[0], prompt_logprobs=3)
    cold_llm = make_llm(model)
    llm = make_llm(model, enable_prefix_caching=True, max_num_seqs=64, async_scheduling=True)
    cold = [tokens_of(generate(cold_llm, [prompt], one)) for one in params]
    (cold_logprobs,) = generate(cold_llm, [prompt], with_logprobs)
    for num_shared in (0, B - 1, B, B + 1, 2 * B, length):
        other = [*prompt[:num_shared], *((i + 1) % VOCAB_SIZE for i in prompt[num_shared:])]
        for one, expected in zip(params, cold, strict=True):
            llm.reset_prefix_cache()
            generate(llm, [other], params[0])
            found = generate(llm, [prompt], one)
            assert found[0].num_cached_tokens == min(num_shared, length - 1) // B * B
            assert tokens_of(found) == expected
        (found_logprobs,) = generate(llm, [prompt], with_logprobs)
        check_prompt_logprobs(found_logprobs, cold_logprobs)
        assert tokens_of([found_logprobs]) == cold[0]


def preempt_at(llm: LLM, *steps: int) -> Counter[str]:
    """Takes all blocks from all that runs before the steps of these numbers; counts what it did."""
    engine, seen = llm.engine, Counter()
    original = engine.step

    def step() -> Any:
        if seen["steps"] in steps:
            seen["sequences"] += len(engine.scheduler.running)
            while engine.scheduler.running:
                engine.scheduler._preempt_last()
        seen["steps"] += 1
        return original()

    engine.step = step  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    "more", [{}, {"enable_prefix_caching": True}, {"async_scheduling": True}], ids=["cold", "cached", "async"]
)
def test_n5_preempted_at_each_step_or_never(model: Path, more: dict[str, Any], count: Callable[..., int]) -> None:
    """In steps of 48 tokens, so that prompts are interrupted too. With a cache, what was computed is found again."""
    prompts, params = prompts_of(*LENGTHS), params_of(count(8, full=60))
    settings = {"max_num_batched_tokens": 48, **more}
    llm = make_llm(model, **settings)
    never = preempt_at(llm)
    expected = tokens_of(generate(llm, prompts, params))
    assert never["sequences"] == 0
    for k in range(1, never["steps"] - 1):
        llm = make_llm(model, **settings)
        seen = preempt_at(llm, k)
        assert tokens_of(generate(llm, prompts, params)) == expected, f"preempted before step {k}"
        assert 0 < seen["sequences"] == llm.engine.stats().num_preemptions
        llm.close()


class Poison:
    """Fills every block with NaN, through the attention backend, as soon as no sequence and no hash holds it.

    A block that is evicted from the prefix cache counts too: what it held is nobody's any more.
    """

    def __init__(self, llm: LLM) -> None:
        self.runner = llm.engine._runner
        self.specs = list(number_layers(self.runner.model))  # type: ignore[arg-type]
        self.pools = llm.engine.scheduler.blocks.pools
        self.free = [set(range(pool.num_blocks)) for pool in self.pools]
        self.num_poisoned = 0
        for pool, free in zip(self.pools, self.free, strict=True):
            self._watch(pool, free)
        self._dirty: dict[int, list[set[int]]] = {}  # by step
        self._prepare, self._forward = self.runner.prepare, self.runner.forward
        self.runner.prepare, self.runner.forward = self.prepare, self.forward  # type: ignore[method-assign]
        for group, free in enumerate(self.free):
            self.fill(group, free)

    def _watch(self, pool: Any, free: set[int]) -> None:
        release, allocate = pool.release, pool.allocate

        def releasing(block: int) -> None:
            release(block)
            if pool._refs[block] == 0 and block not in pool.cache:
                free.add(block)

        def allocating() -> int:
            free.add(block := allocate())
            return block

        pool.release, pool.allocate = releasing, allocating

    def prepare(self, batch: ScheduledBatch) -> PreparedStep:
        """What is free now is read by no step from this one on, but maybe by one that still runs."""
        prepared = self._prepare(batch)
        self._dirty[id(prepared)] = [set(free) for free in self.free]
        for free in self.free:
            free.clear()
        return prepared

    def forward(self, prepared: PreparedStep) -> torch.Tensor:
        """Copies come first, as they would: a block may be freed by the very step that copies it."""
        dirty = self._dirty.pop(id(prepared))
        self.runner.copy_blocks(prepared.batch.block_copies)
        for copy in prepared.batch.block_copies:
            if copy.kind is not CopyKind.OUT:
                dirty[copy.group].discard(copy.destination)
        for group, blocks in enumerate(dirty):
            self.fill(group, blocks)
        return self._forward(replace(prepared, batch=replace(prepared.batch, block_copies=())))

    def fill(self, group: int, blocks: set[int]) -> None:
        if not blocks:
            return
        self.num_poisoned += len(blocks)
        ids = np.fromiter(sorted(blocks), np.int32)
        spec, lens = self.specs[group], np.full(len(ids), BLOCK_SIZE, np.int32)
        slots = (ids[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE, dtype=np.int32)).ravel()
        metadata = AttentionMetadata(
            query_lens_S=lens, seq_lens_S=lens, block_tables_SB=ids[:, None], slot_mapping_T=slots
        )
        q = torch.zeros(len(slots), spec.num_heads, spec.head_size)
        nan = torch.full((len(slots), spec.num_kv_heads, spec.head_size), torch.nan)
        backend = self.runner.backends[group]
        plan = backend.plan(metadata)
        for cache in self.runner.kv_caches[group]:
            backend.forward(q, nan, nan, cache, plan)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 24, "async_scheduling": True},
        {"num_blocks": 16},
        {"num_blocks": 24, "enable_prefix_caching": True, "async_scheduling": True},
        {"num_blocks": 24, "enable_prefix_caching": True, "async_scheduling": True, "swap_space": 0.01},
    ],
    ids=str,
)
def test_n6_freed_blocks_hold_nan(
    model: Path, settings: dict[str, Any], count: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairlead.engine.swap_costs.measure", free_copies)
    prompts, params = prompts_of(*LENGTHS), params_of(count(20, full=120))
    expected = tokens_of(generate(make_llm(model), prompts, params))
    llm = make_llm(model, **settings)
    poison = Poison(llm)
    num_at_start = poison.num_poisoned
    for _ in range(2):
        assert tokens_of(generate(llm, prompts, params)) == expected
    for _ in range(2):  # alone, where nobody else takes the blocks of its prompt before it comes again
        assert tokens_of(generate(llm, prompts[-1:], params[-1:])) == expected[-1:]
    stats = llm.engine.stats()
    assert poison.num_poisoned > num_at_start + 40
    assert (stats.num_preemptions > 0) == ("num_blocks" in settings)
    assert (stats.num_prefix_hits > 0) == ("enable_prefix_caching" in settings)
    assert (stats.num_blocks_swapped_in > 0) == ("swap_space" in settings)


def test_n6_a_poisoned_block_that_is_held_would_show(model: Path) -> None:
    llm = make_llm(model)
    poison = Poison(llm)
    request, _ = llm._request(prompts_of(40)[0], SamplingParams(temperature=0, detokenize=False))
    llm.engine.add_request(request)
    llm.engine.step()
    (sequence,) = llm.engine.scheduler.running
    poison.fill(0, {sequence.block_tables[0].blocks[-1]})
    (delta,) = llm.engine.step()
    assert delta.error is not None
    assert "not a number" in delta.error


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"seed": 7},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 24, "enable_prefix_caching": True},
        {"num_blocks": 16, "block_size": 16},
    ],
    ids=str,
)
def test_n13_a_seed_gives_the_same_after_a_restart_and_in_a_crowd(
    model: Path, settings: dict[str, Any], count: Callable[..., int]
) -> None:
    """`seed` among the settings is the engine's own: it must not matter where a request has one."""
    first = make_llm(model)
    prompts = prompts_of(*LENGTHS)
    for round_ in range(count(1, full=10)):
        params = [
            replace(one, temperature=one.temperature or 1.0, seed=100 * round_ + i)
            for i, one in enumerate(params_of(count(20, full=100)))
        ]
        alone = [tokens_of(generate(first, [p], s))[0] for p, s in zip(prompts, params, strict=True)]
        crowd = [*prompts, *prompts[::-1]]
        others = [replace(one, seed=None) for one in params[::-1]]
        restarted = make_llm(model, async_scheduling=True, **settings)
        assert tokens_of(generate(restarted, crowd, [*params, *others]))[: len(prompts)] == alone
        assert (restarted.engine.stats().num_preemptions > 0) == ("num_blocks" in settings)
        restarted.close()


def test_n13_other_seeds_give_other_tokens(model: Path) -> None:
    params = SamplingParams(max_tokens=20, detokenize=False)
    runs = [tokens_of(generate(make_llm(model, seed=seed), prompts_of(*LENGTHS), params)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]
    seeded = [SamplingParams(max_tokens=20, detokenize=False, seed=seed) for seed in range(20)]
    found = tokens_of(generate(make_llm(model), prompts_of(40) * 20, seeded))
    assert len({sequences[0] for sequences in found}) == 20
