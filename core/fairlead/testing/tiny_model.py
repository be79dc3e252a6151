"""Small random Llama checkpoints whose outputs vary, so that a wrong position or head shows in the tokens."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional

# Of a matrix on an input of variance 1. Attention scores then spread by about 4, sharp enough that greedy outputs of 64
# tokens have 43 distinct ones of 128 on average (30 in the worst of 384 runs), rather than falling into a short cycle.
_GAIN, _QUERY_GAIN = 1.5, 3.0


def write_tiny_llama(
    directory: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    vocab_size: int = 128,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = False,
    rope: Mapping[str, Any] | None = None,
    attention_bias: bool = False,
    dtype: str = "float32",
    initializer_range: float | None = None,
) -> Path:
    """Writes config.json and model.safetensors into `directory` (made if missing) and returns it.

    `rope` goes into the config's rope_parameters. `initializer_range` scales the matrices; left out, it is
    1 / sqrt(inputs). There is no tokenizer and no end-of-sequence token. Equal arguments, equal bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    head_size = head_dim or hidden_size // num_heads
    intermediate_size = 2 * hidden_size
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_size,
        "max_position_embeddings": max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **(rope or {})},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": dtype,
    }
    rng = np.random.default_rng(seed)
    torch_dtype: torch.dtype = getattr(torch, dtype)

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
        return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))

    def matrix(num_outputs: int, num_inputs: int, gain: float) -> torch.Tensor:
        return normal(num_outputs, num_inputs, std=gain * (initializer_range or num_inputs**-0.5))

    def token_rows() -> torch.Tensor:
        # Rows of equal length: else the longest ones win almost every step.
        rows: torch.Tensor = functional.normalize(normal(vocab_size, hidden_size), dim=1)
        return rows * (math.sqrt(hidden_size) / 2)

    tensors = {"model.embed_tokens.weight": token_rows()}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = normal(hidden_size, mean=1.0, std=0.2)
        for name, num_outputs, num_inputs in (
            ("self_attn.q_proj", num_heads * head_size, hidden_size),
            ("self_attn.k_proj", num_kv_heads * head_size, hidden_size),
            ("self_attn.v_proj", num_kv_heads * head_size, hidden_size),
            ("self_attn.o_proj", hidden_size, num_heads * head_size),
            ("mlp.gate_proj", intermediate_size, hidden_size),
            ("mlp.up_proj", intermediate_size, hidden_size),
            ("mlp.down_proj", hidden_size, intermediate_size),
        ):
            gain = _QUERY_GAIN if name.endswith("q_proj") else _GAIN
            tensors[f"{prefix}{name}.weight"] = matrix(num_outputs, num_inputs, gain)
            if attention_bias and name.startswith("self_attn"):
                tensors[f"{prefix}{name}.bias"] = normal(num_outputs, std=0.5)
    # Both signs: else a tied head, whose rows are the embeddings, would repeat the last token for ever.
    tensors["model.norm.weight"] = normal(hidden_size).sign()
    if not tie_word_embeddings:
        tensors["lm_head.weight"] = token_rows()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.to(torch_dtype) for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
