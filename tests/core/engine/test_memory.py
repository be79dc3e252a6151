"""What an engine keeps does not grow with the requests that it has served. The model is a null one: no tensors."""

import gc
import random
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fairlead import LLM, SamplingParams
from fairlead.engine.model_runner import PreparedStep
from fairlead.request import TokenLogprobs
from fairlead.scheduling.batch import SampledToken, StepResult

PER_ROUND = 250
MAX_GROWTH_BYTES = 32 * 1024  # an entry of a dict for every request would be more, at the quick count too


def sample(prepared: PreparedStep, hidden: object, contexts: object, bitmask: object) -> StepResult:
    """Tokens that depend on seed and position alone, in place of a model's."""
    batch = prepared.batch
    sampled = []
    prompt_logprobs = {}
    for chunk in batch.chunks:
        best = TokenLogprobs(token_ids=(5, 6), logprobs=(-1.0, -2.0), rank=1)
        if chunk.sample_seed is not None:
            token_id = (chunk.sample_seed >> 7 ^ chunk.position * 0x9E37) % 1024
            sampled.append(SampledToken(token_id=token_id, logprobs=best if chunk.params.logprobs else None))
        if chunk.extras is not None and chunk.extras.prompt_targets:
            prompt_logprobs[chunk.seq_id] = [best] * len(chunk.extras.prompt_targets)
    return StepResult(sampled=sampled, prompt_logprobs=prompt_logprobs)


@pytest.fixture
def llm() -> Iterator[LLM]:
    llm = LLM("demo", dtype="float32", max_num_seqs=64, num_blocks=40, max_model_len=128, max_num_batched_tokens=256)
    runner: Any = llm.engine._runner
    runner.prepare = lambda batch: PreparedStep(batch=batch, inputs=None, step=None)  # type: ignore[arg-type]
    runner.forward, runner.sample = lambda prepared: None, sample
    yield llm
    llm.close()


def serve(llm: LLM, rng: random.Random) -> None:
    """One round of requests of every kind; some share prefixes, one is left in the middle."""
    kinds: list[dict[str, Any]] = [
        {},
        {"n": 3},
        {"n": 1, "best_of": 2},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"stop": ["e", "th"], "repetition_penalty": 1.2},
        {"stop_token_ids": list(range(0, 1024, 9)), "min_tokens": 2},
        {"bad_words": ["the"], "temperature": 0},
    ]
    prompts = [[7, 8, 9] * rng.randrange(1, 9) + [rng.randrange(1024)] for _ in range(PER_ROUND)]
    params = [SamplingParams(max_tokens=rng.choice((3, 4, 5, 30)), **rng.choice(kinds)) for _ in prompts]
    llm.generate(prompts, params, use_tqdm=False)
    stream = llm.generate_stream(prompts[0], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()


def test_memory_does_not_grow_with_requests(llm: LLM, count: Callable[..., int]) -> None:
    rng = random.Random(0)
    for _ in range(8):  # the prefix cache fills, tables of texts are made
        serve(llm, rng)
    tracemalloc.start()
    try:
        serve(llm, rng)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count(2_000, full=100_000) // PER_ROUND):
            serve(llm, rng)
        gc.collect()
        growth = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    print(f"{growth} bytes more after {count(2_000, full=100_000)} requests")
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    assert stats.kv_cache_usage == 0
    assert growth < MAX_GROWTH_BYTES
