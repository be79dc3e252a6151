"""N1: greedy output in float32 equals transformers, token for token, however the work is cut up."""

from collections.abc import Callable
from typing import Any

import pytest

from fairlead import demo
from fairlead.testing.reference import Reference, check_faults_show, check_greedy, check_logits, prompts_for
from fairlead.testing.tiny_model import write_tiny_llama

BLOCK_SIZE = 16

CHECKPOINTS = {
    "mha": {"seed": 1, "num_heads": 4, "num_kv_heads": 4},
    "gqa3-tied": {"seed": 2, "num_heads": 6, "num_kv_heads": 2, "hidden_size": 96, "tie_word_embeddings": True},
    "gqa8": {"seed": 3, "num_heads": 8, "num_kv_heads": 1, "hidden_size": 64, "head_dim": 16},
    "llama3-rope": {
        "seed": 4,
        "rope": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "bias-gqa8-tied": {
        "seed": 5,
        "num_heads": 8,
        "num_kv_heads": 1,
        "hidden_size": 128,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
}

MODES: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "few seats": {"max_num_seqs": 3, "block_size": 1},
    "prefix hits": {"enable_prefix_caching": True, "rounds": 2},
    "tenth of the demand": {"num_blocks": 0},
}


@pytest.fixture(scope="module", params=["demo", *CHECKPOINTS])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(name: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    if name == "demo":
        return Reference.of_transformers(demo.path())
    return Reference.of_transformers(write_tiny_llama(tmp_path_factory.mktemp(name), **CHECKPOINTS[name]))


@pytest.mark.parametrize("mode", MODES)
def test_n1_greedy_equals_transformers(reference: Reference, name: str, mode: str, count: Callable[..., int]) -> None:
    num_new = count(24, full=256)
    settings = {"enable_prefix_caching": False, "block_size": BLOCK_SIZE, **MODES[mode]}
    prompts = prompts_for(128, count(16, full=64), 250)
    if "num_blocks" in settings:
        demand = sum(-(-(len(p) + num_new) // BLOCK_SIZE) for p in prompts)
        settings["num_blocks"] = max(demand // 10, -(-(max(map(len, prompts)) + num_new) // BLOCK_SIZE))
    least_distinct = 0.0 if name == "demo" else 0.5  # a trained model may say what it likes
    stats = check_greedy(reference, prompts, num_new, least_distinct=least_distinct, **settings)
    num_hits = sum((len(p) - 1) // BLOCK_SIZE * BLOCK_SIZE for p in prompts) if "rounds" in settings else 0
    assert stats.num_prefix_hits == num_hits
    assert (stats.num_preemptions > 0) == ("num_blocks" in settings)


def test_logits_equal_transformers(reference: Reference) -> None:
    check_logits(reference, *prompts_for(128, 1))


def test_a_wrong_position_or_head_would_show(reference: Reference) -> None:
    check_faults_show(reference, *prompts_for(128, 1))
