"""The checkpoints: real shapes, random weights, no tokenizer. Written once, read by every engine."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smol135m": (
        "llama",
        {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
        | {"head_dim": 64, "intermediate_size": 1536, "vocab_size": 49_152, "rope_theta": 10_000.0}
        | {"rms_norm_eps": 1e-5},
    ),
    "qwen05b": (
        "qwen2",
        {"num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}
        | {"intermediate_size": 4864, "vocab_size": 151_936, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6},
    ),
    "llama1b": (
        "llama",
        {"num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8}
        | {"head_dim": 64, "intermediate_size": 8192, "vocab_size": 128_256, "rope_theta": 500_000.0}
        | {"rms_norm_eps": 1e-5},
    ),
    "tiny": (
        "llama",
        {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        | {"head_dim": 16, "intermediate_size": 128, "vocab_size": 1024},
    ),
}
COMMON = {"tie_word_embeddings": True, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 0}


def checkpoint(folder: Path, model: str) -> Path:
    """The model's directory, in bfloat16; written if it is not there yet."""
    directory = folder / model
    if not (directory / "config.json").is_file():
        model_type, settings = SHAPES[model]
        make: Any = transformers.CONFIG_MAPPING[model_type]
        build: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
        torch.manual_seed(0)
        network = build(make(**settings, **COMMON), dtype=torch.bfloat16)
        network.save_pretrained(directory)
    return directory


def num_params(directory: Path) -> tuple[int, int]:
    """Weights of the matrices of all layers, and of the head."""
    config: Any = transformers.AutoConfig.from_pretrained(directory)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    per_layer = config.hidden_size * (heads * size + 3 * config.intermediate_size)
    return config.num_hidden_layers * per_layer, config.hidden_size * config.vocab_size
