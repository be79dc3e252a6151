"""The models: shapes of known families with random weights, from config classes alone (nothing is downloaded)."""

from pathlib import Path
from typing import Any

import transformers

LLAMA = {
    "max_position_embeddings": 16384,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
}
QWEN = {**LLAMA, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "vocab_size": 151_936, "head_dim": 128}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama1b": (
        "llama",
        LLAMA
        | {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64}
        | {"intermediate_size": 8192, "tie_word_embeddings": True},
    ),
    "qwen1b": (
        "qwen3",
        QWEN
        | {"num_hidden_layers": 28, "hidden_size": 2048, "num_attention_heads": 16}
        | {"intermediate_size": 6144, "tie_word_embeddings": True},
    ),
    "llama8b": (
        "llama",
        LLAMA
        | {"num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128}
        | {"intermediate_size": 14_336, "tie_word_embeddings": False},
    ),
    "qwen8b": (
        "qwen3",
        QWEN
        | {"num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32}
        | {"intermediate_size": 12_288, "tie_word_embeddings": False},
    ),
}
"""Model type and settings by name; `qwen1b` is Qwen3-1.7B's shape."""

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
}


def config_of(name: str, *, is_tiny: bool) -> Any:
    """The config of a model of ours. No token id ends a sequence."""
    model_type, settings = SHAPES[name]
    no_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    make: Any = transformers.CONFIG_MAPPING[model_type]
    config = make(**settings | (TINY if is_tiny else {}) | no_ids)
    config.architectures = [ARCHITECTURES[model_type]]
    return config


def write_config(name: str, folder: Path, *, is_tiny: bool) -> Path:
    """A model directory that has a config and nothing else; `load_format="dummy"` draws its weights."""
    directory = folder / name
    directory.mkdir(parents=True, exist_ok=True)
    config_of(name, is_tiny=is_tiny).save_pretrained(directory)
    return directory


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a layer's matrices, fused as the engine fuses them."""
    width, size = config.hidden_size, config.head_dim
    queries, both = config.num_attention_heads * size, 2 * config.num_key_value_heads * size
    return {
        "qkv": (width, queries + both),
        "o": (queries, width),
        "gate_up": (width, 2 * config.intermediate_size),
        "down": (config.intermediate_size, width),
    }


def body_params(config: Any) -> int:
    """Weights of the matrices of all layers."""
    return int(config.num_hidden_layers * sum(i * o for i, o in linear_shapes(config).values()))


def head_params(config: Any) -> int:
    """Weights of the matrix that makes logits."""
    return int(config.hidden_size * config.vocab_size)


def kv_bytes_per_token(config: Any, itemsize: int) -> int:
    """Keys and values of one token in all layers."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize)


def prefill_ops(config: Any, num_tokens: int) -> int:
    """Multiplications and additions of one prompt, whose last token alone gets logits; attention is causal."""
    attention = 2 * int(config.num_hidden_layers * config.num_attention_heads * config.head_dim) * num_tokens**2
    return 2 * body_params(config) * num_tokens + 2 * head_params(config) + attention
