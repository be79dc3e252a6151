"""Every two features of the engine at once: the tokens are those of the plain run, in float32.

The plain run has each request alone, one sequence at a time, with a whole prompt and room for all. Here all requests
come together, and share prefixes. A new feature is one line of FEATURES.
"""

import itertools
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairlead import LLM, RequestOutput, SamplingParams, StructuredOutputParams, demo
from fairlead.request import EngineStats
from fairlead.scheduling.batch import ScheduledBatch
from fairlead.scheduling.scheduler import _SEED_STEP
from fairlead.testing.equivalence import (
    MODELS,
    VOCAB_SIZE,
    Tokens,
    free_copies,
    generate,
    make_llm,
    num_partial_chunks,
    share_distinct,
    tokens_of,
    watch,
)

KEPT_SEEDS: tuple[int, ...] = ()  # those that failed once; they run always
LENGTHS = (1, 17, 32, 41, 64, 75)
SHARED = 33  # tokens that prompts begin with alike
MAX_TOKENS = 24
REGEX = "([0-9][a-f]){8,10}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What an engine did with all requests."""

    stats: EngineStats
    steps: list[ScheduledBatch]
    outputs: list[RequestOutput]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """How one feature is switched on, and how to see that it was at work."""

    happened: Callable[[Run], bool]
    settings: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    model: str = "full"


FEATURES = {
    "prefix cache": Feature(
        settings={"enable_prefix_caching": True}, happened=lambda run: run.stats.num_prefix_hits > SHARED
    ),
    "chunking": Feature(
        settings={"max_num_batched_tokens": 24}, happened=lambda run: num_partial_chunks(run.steps) > len(LENGTHS)
    ),
    "preemption": Feature(settings={"num_blocks": 10}, happened=lambda run: run.stats.num_preemptions > 0),
    "swap": Feature(
        settings={"num_blocks": 10, "swap_space": 0.01}, happened=lambda run: run.stats.num_blocks_swapped_in > 0
    ),
    "async": Feature(
        settings={"async_scheduling": True},
        happened=lambda run: any(chunk.source_row is not None for step in run.steps for chunk in step.chunks),
    ),
    "n": Feature(params={"n": 3}, happened=lambda run: all(len(output.outputs) == 3 for output in run.outputs)),
    "structured": Feature(
        params={"structured_outputs": StructuredOutputParams(regex=REGEX)},
        happened=lambda run: all(re.fullmatch(REGEX, one.text) for o in run.outputs[1::2] for one in o.outputs),
    ),
    "sliding window": Feature(
        model="window",
        happened=lambda run: any(first > 0 for s in run.steps for c in s.chunks for first, _ in c.block_tables),
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each with the demo's tokenizer, which grammars need."""
    written = {name: write(tmp_path_factory.mktemp(name)) for name, write in MODELS.items()}
    for directory in written.values():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo.path() / name, directory / name)
    return written


def requests_of(seed: int, features: Iterable[Feature]) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts with a common beginning; every other request takes a feature's params, but all take its `n`."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(4, VOCAB_SIZE, SHARED).tolist()
    prompts = [[*shared[: n - 1], *rng.integers(4, VOCAB_SIZE, n).tolist()][:n] for n in LENGTHS]
    more: dict[str, Any] = {name: value for feature in features for name, value in feature.params.items()}
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {}, {"top_p": 0.9}, {"repetition_penalty": 1.3}, {"top_k": 9}]
    params = []
    for i in range(len(LENGTHS)):
        mine = more if i % 2 else {name: value for name, value in more.items() if name == "n"}
        own = {
            "seed": int(rng.integers(2**31)),
            "max_tokens": MAX_TOKENS,
            "ignore_eos": "structured_outputs" not in mine,
        }
        params.append(SamplingParams(**{**own, **kinds[i % len(kinds)], **mine}))
    return prompts, params


def plain(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> Tokens:
    """Each sequence of each request as a request of its own."""
    found = []
    for prompt, one in zip(prompts, params, strict=True):
        assert one.seed is not None
        seeds = [(one.seed + i * _SEED_STEP) % 2**64 for i in range(one.n)]
        alone = [replace(one, n=1, seed=seed - 2**64 if seed >= 2**63 else seed) for seed in seeds]
        found.append([tokens_of(generate(llm, [prompt], single))[0][0] for single in alone])
    return found


@pytest.fixture(scope="module")
def llms(models: dict[str, Path]) -> dict[str, LLM]:
    """The plain engines."""
    return {name: open_llm(directory) for name, directory in models.items()}


def open_llm(directory: Path, **settings: Any) -> LLM:
    return make_llm(directory, **{"skip_tokenizer_init": False, "max_model_len": 128, **settings})


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(FEATURES, 2)))
def test_two_features_at_once_change_no_token(
    models: dict[str, Path],
    llms: dict[str, LLM],
    first: str,
    second: str,
    count: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fairlead.engine.swap_costs.measure", free_copies)
    pair = FEATURES[first], FEATURES[second]
    model = "window" if "window" in (pair[0].model, pair[1].model) else "full"
    for seed in (*KEPT_SEEDS, *range(count(1, full=10))):
        prompts, params = requests_of(seed, pair)
        expected = plain(llms[model], prompts, params)
        assert share_distinct(expected[::2]) >= 0.5
        llm = open_llm(models[model], **{**pair[0].settings, **pair[1].settings})
        steps = watch(llm)
        for _ in range(1 + llm.config.cache.enable_prefix_caching):
            outputs = generate(llm, prompts, params)
            assert tokens_of(outputs) == expected, f"seed {seed}"
        run = Run(stats=llm.engine.stats(), steps=steps, outputs=outputs)
        for name, feature in zip((first, second), pair, strict=True):
            assert feature.happened(run), f"seed {seed}: there was no {name}"
        llm.close()


def test_no_feature_is_at_work_in_the_plain_run(llms: dict[str, LLM]) -> None:
    prompts, params = requests_of(0, ())
    llm = llms["full"]
    steps = watch(llm)
    run = Run(outputs=generate(llm, prompts, params), stats=llm.engine.stats(), steps=steps)
    assert not any(feature.happened(run) for feature in FEATURES.values())
