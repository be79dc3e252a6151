"""Tiny checkpoints must not hide faults: their outputs vary, and depend on every position and head."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fairlead.config import EngineConfig
from fairlead.engine.engine import EngineCore
from fairlead.request import Request, SamplingParams
from fairlead.testing.tiny_model import write_tiny_llama

NUM_TOKENS = 64
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "ratio 1, tied": {"num_kv_heads": 4, "tie_word_embeddings": True},
    "ratio 3, bias": {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "attention_bias": True},
    "ratio 8, tied, llama3": {
        "num_heads": 8,
        "num_kv_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope": LLAMA3,
    },
}


def greedy(directory: Path) -> list[list[int]]:
    """64 tokens after each of four random prompts."""
    engine = EngineCore(EngineConfig.of(model=str(directory), num_blocks=100))
    rng = np.random.default_rng(0)
    for i in range(4):
        engine.add_request(
            Request(
                request_id=str(i),
                prompt_token_ids=tuple(rng.integers(0, 128, 10 + 10 * i).tolist()),
                params=SamplingParams(temperature=0, max_tokens=NUM_TOKENS),
            )
        )
    found: list[list[int]] = [[] for _ in range(4)]
    while engine.has_work:
        for delta in engine.step():
            found[int(delta.request_id)] += delta.token_ids
    return found


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_of_the_tokens_are_distinct(tmp_path: Path, shape: str, seed: int) -> None:
    found = greedy(write_tiny_llama(tmp_path, seed=seed, **SHAPES[shape]))
    distinct = [len(set(tokens)) for tokens in found]
    assert sum(distinct) >= len(distinct) * NUM_TOKENS / 2


def test_every_head_and_the_positions_change_every_output(tmp_path: Path) -> None:
    file, config = write_tiny_llama(tmp_path) / "model.safetensors", tmp_path / "config.json"
    before, tensors = greedy(tmp_path), load_file(file)
    for layer in range(2):
        for head in range(4):
            name = f"model.layers.{layer}.self_attn.o_proj.weight"
            weight = tensors[name].clone()
            weight[:, 16 * head : 16 * head + 16] = 0
            save_file({**tensors, name: weight}, file)
            assert all(a != b for a, b in zip(before, greedy(tmp_path), strict=True)), f"layer {layer}, head {head}"
    save_file(tensors, file)
    config.write_text(config.read_text().replace("10000.0", "9000.0"))
    assert all(a != b for a, b in zip(before, greedy(tmp_path), strict=True)), "positions"


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    a, b, c = (write_tiny_llama(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (a / "model.safetensors").read_bytes() != (c / "model.safetensors").read_bytes()


def test_the_config_is_one_that_transformers_takes(tmp_path: Path) -> None:
    from transformers import AutoConfig

    write_tiny_llama(tmp_path, rope=LLAMA3, dtype="bfloat16", vocab_size=50)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "llama"
    assert config.rope_parameters["rope_type"] == "llama3"
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == config.vocab_size == 50


def test_a_given_range_scales_the_matrices(tmp_path: Path) -> None:
    weights = load_file(write_tiny_llama(tmp_path, initializer_range=0.1) / "model.safetensors")
    assert float(weights["model.layers.0.self_attn.v_proj.weight"].std()) == pytest.approx(0.15, rel=0.1)
