"""What the tests of equivalence share: models that show a fault, requests of every kind, and what their steps were."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fairlead import LLM, RequestOutput, SamplingParams
from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.planner import EnginePlan
from fairlead.scheduling.batch import ScheduledBatch
from fairlead.scheduling.host_tier import SwapCosts
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama

BLOCK_SIZE = 16
WINDOW = 24
VOCAB_SIZE = 1024  # the demo's, so that its tokenizer fits
MAX_MODEL_LEN = 256

MODELS: dict[str, Callable[[Path], Path]] = {
    "full": lambda folder: write_tiny_llama(folder, seed=3, vocab_size=VOCAB_SIZE),
    "window": lambda folder: write_tiny_checkpoint(
        folder,
        "gemma3_text",
        seed=1,
        settings={"sliding_window": WINDOW, "vocab_size": VOCAB_SIZE, "eos_token_id": None},
        embedding_scale=4.0,
    ),
}
"""One cache group, and two of which one forgets what has left its window. Without a tokenizer."""

PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.2},
    {"seed": 1},
    {"seed": 2, "top_k": 20, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"seed": 3, "top_p": 0.9, "logit_bias": {5: 3.0, 6: -100}, "n": 2},
    {"seed": 4, "min_p": 0.05, "temperature": 1.3},
    {"seed": 5, "min_tokens": 5, "stop_token_ids": list(range(0, VOCAB_SIZE, 40))},
    {"seed": 6, "n": 3, "allowed_token_ids": list(range(40, 200)), "repetition_penalty": 1.2},
]

Tokens = list[list[tuple[int, ...]]]
"""By request, by sequence."""


def make_llm(directory: Path, **settings: Any) -> LLM:
    """An engine in float32 without a tokenizer. What is a feature of the engine is off unless asked for."""
    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
        "async_scheduling": False,
    }
    return LLM(str(directory), **{**defaults, **settings})


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng([seed, *lengths])
    return [rng.integers(0, VOCAB_SIZE, n).tolist() for n in lengths]


def params_of(max_tokens: int, **more: Any) -> list[SamplingParams]:
    """One of each kind."""
    return [SamplingParams(**{"max_tokens": max_tokens, "detokenize": False, **p, **more}) for p in PARAMS]


def generate(llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[RequestOutput]:
    """All at once; asserts that nothing is left behind."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    assert llm.engine.stats().kv_cache_usage == 0
    llm.engine.scheduler.check_integrity()
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> Tokens:
    return [[tuple(one.token_ids) for one in output.outputs] for output in outputs]


def share_distinct(tokens: Tokens) -> float:
    """The mean share of distinct tokens in an output: low where a fault would be hidden."""
    return float(np.mean([len(set(ids)) / len(ids) for ids in itertools.chain(*tokens)]))


def watch(llm: LLM) -> list[ScheduledBatch]:
    """The steps of an engine, from now on."""
    scheduler = llm.engine.scheduler
    schedule, seen = scheduler.schedule, []

    def scheduling() -> ScheduledBatch:
        seen.append(schedule())
        return seen[-1]

    scheduler.schedule = scheduling  # type: ignore[method-assign]
    return seen


def free_copies(plan: EnginePlan, runner: ModelRunner) -> SwapCosts:
    """In place of `swap_costs.measure`, so that swap space is used however little a tiny model takes to compute."""
    nothing = (0.0,) * len(plan.cache_groups)
    return SwapCosts(out_s=nothing, in_s=nothing, overhead_s=0.0, token_s=1.0)


def num_partial_chunks(steps: list[ScheduledBatch]) -> int:
    """How often a sequence got less than what it has still to compute."""
    return sum(chunk.sample_seed is None for step in steps for chunk in step.chunks)
