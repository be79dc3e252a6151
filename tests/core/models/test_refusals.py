"""What a config.json or a checkpoint may ask for that no family serves: refused in one line that names it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairlead import LLM
from fairlead.config import EngineConfig
from fairlead.engine.builder import build
from fairlead.errors import CheckpointError, UnsupportedModelError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
}

UNSUPPORTED = [
    ("LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "proportional"}}, "rope_type"),
    ("LlamaForCausalLM", {"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1]}}, "mrope_section"),
    ("LlamaForCausalLM", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("MistralForCausalLM", {"layer_types": ["full_attention"] * 2}, "layer_types"),
    ("MixtralForCausalLM", {**EXPERTS, "hidden_act": "gelu_new"}, "hidden_act"),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    ("Qwen2ForCausalLM", {"use_mrope": True}, "use_mrope"),
    ("Qwen2MoeForCausalLM", {**EXPERTS, "hidden_act": "gelu_new"}, "hidden_act"),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type"),
    ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("Gemma2ForCausalLM", {"hidden_activation": "relu"}, "hidden_act"),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("Gemma3ForCausalLM", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    ("StableLmForCausalLM", {"rope_pct": 0.5}, "rope_pct"),
    ("StableLmForCausalLM", {"partial_rotary_factor": 0.4}, "partial_rotary_factor"),
    ("DeepseekV2ForCausalLM", {**LATENT, "topk_method": "other"}, "topk_method"),
    ("DeepseekV2ForCausalLM", {**LATENT, "norm_topk_prob": True}, "norm_topk_prob"),
    ("DeepseekV2ForCausalLM", {**LATENT, "scoring_func": "sigmoid"}, "scoring_func"),
    ("DeepseekV2ForCausalLM", {**LATENT, "attention_bias": True}, "attention_bias"),
    ("DeepseekV2ForCausalLM", {**LATENT, "moe_layer_freq": 2}, "moe_layer_freq"),
    ("DeepseekV3ForCausalLM", {**LATENT, "first_k_dense_replace": 0, "topk_method": "greedy"}, "topk_method"),
    ("DeepseekV3ForCausalLM", {**LATENT, "first_k_dense_replace": 0, "scoring_func": "softmax"}, "scoring_func"),
]

BROKEN = [
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor"),
    ("LlamaForCausalLM", {"rms_norm_eps": "small"}, "rms_norm_eps"),
    ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": -1}}, "beta_fast"),
    ("OlmoForCausalLM", {"clip_qkv": 0}, "clip_qkv"),
    ("StableLmForCausalLM", {"partial_rotary_factor": "half"}, "partial_rotary_factor"),
    ("Phi3ForCausalLM", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor"),
    ("MistralForCausalLM", {"sliding_window": 0}, "sliding_window"),
    ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
    ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"] * 2}, "sliding_window"),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers"),
    ("MixtralForCausalLM", {**EXPERTS, "num_experts_per_tok": 5}, "num_experts_per_tok"),
    ("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts_per_tok": 5}, "num_experts_per_tok"),
    ("Qwen3MoeForCausalLM", {**EXPERTS, "moe_intermediate_size": None}, "moe_intermediate_size"),
    ("DeepseekV2ForCausalLM", {**LATENT, "topk_method": "group_limited_greedy", "n_group": 3}, "n_group"),
    ("DeepseekV3ForCausalLM", {**LATENT, "first_k_dense_replace": 0, "topk_group": 3}, "topk_group"),
]


def write_config(directory: Path, architecture: str, settings: dict[str, Any]) -> EngineConfig:
    """A config.json alone: whatever is refused is refused before weights are read."""
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture], **SMALL, **settings}))
    return EngineConfig.of(model=str(directory), load_format="dummy", num_blocks=64)


@pytest.mark.parametrize(("architecture", "settings", "key"), UNSUPPORTED)
def test_unsupported_settings_are_refused_by_name(
    tmp_path: Path, architecture: str, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        build(write_config(tmp_path, architecture, settings))


@pytest.mark.parametrize(("architecture", "settings", "key"), BROKEN)
def test_broken_settings_are_refused_by_name(
    tmp_path: Path, architecture: str, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(CheckpointError, match=key):
        build(write_config(tmp_path, architecture, settings))


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("MixtralForCausalLM", EXPERTS),
        ("Gemma3ForCausalLM", {"head_dim": 8}),
        ("DeepseekV3ForCausalLM", {**LATENT, "first_k_dense_replace": 1}),
        ("StableLmForCausalLM", {"qk_layernorm": True}),
    ],
)
def test_dummy_weights_and_half_precision_run(tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    write_config(tmp_path, architecture, settings)
    llm = LLM(
        str(tmp_path), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, num_blocks=64, max_model_len=32
    )
    (output,) = llm.generate([[1, 2, 3]], use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 16
    llm.close()


def test_layers_for_speculation_are_not_read(tmp_path: Path) -> None:
    import transformers

    config = transformers.DeepseekV3Config(
        **{**SMALL, **LATENT, "num_key_value_heads": 4, "q_lora_rank": None, "first_k_dense_replace": 0}
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.layers.2.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    build(EngineConfig.of(model=str(tmp_path), num_blocks=64))

    save_file({**weights, "model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="eh_proj"):
        build(EngineConfig.of(model=str(tmp_path), num_blocks=64))
