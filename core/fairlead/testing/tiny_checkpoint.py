"""Small random checkpoints of any decoder of transformers, drawn so that outputs vary (see tiny_model)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

MAX_PARAMETERS = 6_000_000
_GAIN, _BIAS = 1.5, 0.1  # see tiny_model

_UNGATED_GAIN = 0.5  # behind a plain GELU or ReLU, whose mean is not 0: else the same tokens win almost every step

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "vocab_size_per_layer_input": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "sliding_window": 24,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "partial_rotary_factor": 0.5,
    "rotary_dim": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
"""Small values of the settings that configs of transformers share."""


def tiny_config(model_type: str, settings: Mapping[str, Any] | None = None) -> transformers.PreTrainedConfig:
    """The type's default config with small sizes, one layer of each kind at least, and then the given settings."""
    cls = transformers.CONFIG_MAPPING[model_type]
    default = cls()
    names = {f.name for f in fields(cls)} if hasattr(cls, "__dataclass_fields__") else set(vars(default))
    wanted: dict[str, Any] = {}
    for name, value in SIZES.items():
        own = cls.attribute_map.get(name, name)
        if own in names and (getattr(default, own, None) is not None or name == "head_dim" or "token" in name):
            wanted[own] = value
    if "kv_lora_rank" in names:
        wanted["num_key_value_heads"] = wanted["num_attention_heads"]  # latent keys are expanded to all heads
    kinds = getattr(default, "layer_types", None)
    if kinds and "layer_types" in names:
        distinct = list(dict.fromkeys(kinds))
        wanted["layer_types"] = (distinct * 2)[: max(2, len(distinct))]
        wanted[cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(wanted["layer_types"])
    config: transformers.PreTrainedConfig = cls(**{**wanted, **(settings or {})})
    return config


def redraw(model: torch.nn.Module, seed: int, *, gain: float = _GAIN, embedding_scale: float = 1.0) -> None:
    """Draws all weights of a fresh model of transformers anew: attention sharp, token rows of equal length, signs in
    the last norm.

    `gain` is that of a matrix on inputs of variance 1: the larger, the more outputs vary, and the more rounding errors
    grow on the way. `embedding_scale` is for models that multiply their embeddings by about that.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = {m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head, embedding = (getattr(model, f"get_{end}put_embeddings", lambda: None)() for end in ("out", "in"))
    rows |= {head.weight} if head is not None else set()
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= {name: t for name, t in model.named_buffers() if name.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, tensor in tensors.items():
            drawn = torch.randn(tensor.shape, generator=generator)
            if tensor in rows:
                # Else the longest ones win almost every step.
                drawn = functional.normalize(drawn, dim=1) * (math.sqrt(drawn.shape[1]) / 2)
                drawn /= embedding_scale if embedding is not None and tensor is embedding.weight else 1.0
            elif tensor.dim() == 1 and name.endswith("weight"):
                drawn = _drawn_norm(name, drawn)
                drawn -= 1.0 if not tensor.any() else 0.0  # Gemma stores them less one
            elif tensor.dim() <= 1:
                drawn *= _BIAS if _in_a_layer(name) else 0.1 * _BIAS
            else:
                queries = any(part in name for part in ("q_proj", "q_b_proj", "query", "qkv", "c_attn", "W_pack"))
                outputs = any(part in name for part in ("fc2", "fc_out", "4h_to_h", "mlp.c_proj"))
                drawn *= (2 * gain if queries else _UNGATED_GAIN if outputs else gain) * drawn.shape[-1] ** -0.5
            tensor.copy_(drawn)


def _drawn_norm(name: str, noise: torch.Tensor) -> torch.Tensor:
    if not _in_a_layer(name):
        return noise.sign()  # else a tied head, whose rows are the embeddings, repeats the last token
    return (4.0 if "q_norm" in name or "q_layernorm" in name else 1.0) + 0.2 * noise


def _in_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def write_tiny_checkpoint(
    directory: Path, model_type: str, *, seed: int = 0, settings: Mapping[str, Any] | None = None, **draw: float
) -> Path:
    """Writes a checkpoint of a type of transformers in float32, without a tokenizer, and returns its directory.

    `draw` goes to `redraw`.
    """
    config = tiny_config(model_type, settings)
    make: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in make(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"the tiny {model_type} has {size} parameters; name smaller settings")
    torch.manual_seed(seed)
    model = make(config)
    redraw(model, seed, **draw)
    model.save_pretrained(directory)
    return directory
