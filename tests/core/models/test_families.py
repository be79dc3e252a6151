"""N1 for every family that shares Llama's frame: logits and greedy tokens equal transformers', in float32.

Each case is a tiny random checkpoint, made with transformers' own configuration class and written by save_pretrained.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import transformers

from fairlead.testing.reference import Reference, check_faults_show, check_greedy, check_logits, prompts_for
from fairlead.testing.tiny_checkpoint import redraw

BLOCK_SIZE = 16
WINDOW = 24

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 600,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny checkpoint: `config` is transformers' class, `settings` what differs from SMALL.

    `is_windowed` says that a wider window must change the output; `draw` goes to `redraw`. `rewrite` turns the
    config.json that transformers writes into the one of the hub: a value, or None to drop the key.
    `save` goes to save_pretrained. `short_factor` replaces that of the reference, which would choose by the length of
    each sequence.
    """

    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_windowed: bool = False
    draw: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Mapping[str, Any] = field(default_factory=dict)
    short_factor: list[float] | None = None
    save: Mapping[str, Any] = field(default_factory=dict)


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 500.0, **settings}


SHORT_FACTOR, LONG_FACTOR = [1.0, 1.1, 1.2, 1.3, 1.5, 2.0], [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
PHI3_ROPE = rope("longrope", short_factor=SHORT_FACTOR, long_factor=LONG_FACTOR, partial_rotary_factor=0.75)
GEMMA_DRAW = {"embedding_scale": 4.0}

MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 48,
}

LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
}
DEEPSEEK_ROPE = rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.0)

CASES = {
    "mistral": Case(config="MistralConfig", settings={"sliding_window": WINDOW}, is_windowed=True),
    "mistral-full": Case(config="MistralConfig", settings={"sliding_window": None, "head_dim": 24}),
    "qwen2": Case(config="Qwen2Config", settings={"tie_word_embeddings": True}),
    "qwen2-window": Case(
        config="Qwen2Config",
        settings={"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        rewrite={"layer_types": None},
        is_windowed=True,
    ),
    "qwen2-yarn": Case(
        config="Qwen2Config",
        settings={"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=64)},
        rewrite={
            "rope_parameters": None,
            "rope_theta": 500.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "qwen2-dynamic": Case(config="Qwen2Config", settings={"rope_parameters": rope("dynamic", factor=4.0)}),
    "qwen2-linear": Case(config="Qwen2Config", settings={"rope_parameters": rope("linear", factor=4.0)}),
    "qwen3": Case(config="Qwen3Config", settings={"head_dim": 24, "attention_bias": True}),
    "qwen3-window": Case(
        config="Qwen3Config",
        settings={
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        is_windowed=True,
    ),
    "phi3": Case(config="Phi3Config", settings={"sliding_window": WINDOW}, is_windowed=True),
    "phi3-longrope-short": Case(
        config="Phi3Config", settings={"rope_parameters": PHI3_ROPE, "original_max_position_embeddings": 400}
    ),
    "phi3-longrope-long": Case(
        config="Phi3Config",
        settings={"rope_parameters": PHI3_ROPE, "original_max_position_embeddings": 64},
        rewrite={
            "rope_parameters": None,
            "rope_theta": 500.0,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "su", "short_factor": SHORT_FACTOR, "long_factor": LONG_FACTOR},
        },
        short_factor=LONG_FACTOR,
    ),
    "gemma": Case(
        config="GemmaConfig",
        settings={"head_dim": 24},
        draw=GEMMA_DRAW,
        rewrite={"hidden_act": "gelu", "tie_word_embeddings": None},
    ),
    "gemma2": Case(
        config="Gemma2Config",
        settings={
            "head_dim": 24,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
        },
        draw={"embedding_scale": 2.0},
        rewrite={"layer_types": None, "tie_word_embeddings": None},
        is_windowed=True,
    ),
    "gemma3": Case(
        config="Gemma3TextConfig",
        settings={
            "num_hidden_layers": 3,
            "head_dim": 24,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {"sliding_attention": rope("default"), "full_attention": rope("linear", factor=8.0)},
        },
        draw=GEMMA_DRAW,
        is_windowed=True,
    ),
    "gemma3-hub": Case(
        config="Gemma3TextConfig",
        settings={"head_dim": 24, "sliding_window": WINDOW, "sliding_window_pattern": 2},
        draw=GEMMA_DRAW,
        rewrite={
            "layer_types": None,
            "rope_parameters": None,
            "sliding_window_pattern": 2,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "rope_scaling": None,
        },
        is_windowed=True,
    ),
    "mixtral": Case(
        config="MixtralConfig",
        settings={"sliding_window": WINDOW, "num_local_experts": 5, "num_experts_per_tok": 2},
        is_windowed=True,
    ),
    "mixtral-stacked": Case(
        config="MixtralConfig", settings={"num_local_experts": 3}, save={"save_original_format": False}
    ),
    "qwen2-moe": Case(config="Qwen2MoeConfig", settings={**MOE, "num_experts_per_tok": 3, "mlp_only_layers": [0]}),
    "qwen2-moe-window": Case(
        config="Qwen2MoeConfig",
        settings={**MOE, "use_sliding_window": True, "sliding_window": WINDOW, "norm_topk_prob": True},
        rewrite={"layer_types": None},
        is_windowed=True,
    ),
    "qwen3-moe": Case(config="Qwen3MoeConfig", settings={**MOE, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3-moe-stacked": Case(
        config="Qwen3MoeConfig", settings={**MOE, "decoder_sparse_step": 2}, save={"save_original_format": False}
    ),
    "deepseek-v2": Case(
        config="DeepseekV2Config",
        settings={
            **LATENT,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": DEEPSEEK_ROPE,
        },
        draw={"gain": 1.0},
    ),
    "deepseek-v2-lite": Case(config="DeepseekV2Config", settings={**LATENT, "q_lora_rank": None}, draw={"gain": 1.0}),
    "deepseek-v3": Case(
        config="DeepseekV3Config",
        settings={
            **LATENT,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "rope_parameters": DEEPSEEK_ROPE,
        },
        draw={"seed": 2, "gain": 1.1},
        rewrite={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "head_dim": None},
    ),
    "deepseek-v3-halves": Case(
        config="DeepseekV3Config",
        settings={**LATENT, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "rope_interleave": False},
        draw={"gain": 1.0},
    ),
    "olmo": Case(config="OlmoConfig", settings={"clip_qkv": 2.0}),
    "olmo2": Case(config="Olmo2Config"),
    "stablelm": Case(config="StableLmConfig", settings={"use_qkv_bias": True}),
    "stablelm-parallel": Case(
        config="StableLmConfig",
        settings={"use_parallel_residual": True, "qk_layernorm": True},
        rewrite={"rope_parameters": None, "rope_theta": 10000, "partial_rotary_factor": 0.25},
    ),
    "smollm3": Case(
        config="SmolLM3Config",
        settings={"no_rope_layers": [1, 0, 1], "num_hidden_layers": 3},
        rewrite={"layer_types": None},
    ),
    "smollm3-window": Case(
        config="SmolLM3Config",
        settings={"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": WINDOW},
        rewrite={"layer_types": None, "no_rope_layers": None},
        is_windowed=True,
    ),
}

# The cache is sized by max_num_seqs: with so many, blocks that have left the window are still there for prefix hits.
MODES: dict[str, dict[str, Any]] = {
    "at once": {"enable_prefix_caching": False},
    "chunks and prefix hits": {"max_num_batched_tokens": 40, "max_num_seqs": 1024, "rounds": 2},
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reference(case: str, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    made = CASES[case]
    config = getattr(transformers, made.config)(**{**SMALL, **made.settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    redraw(model, **{"seed": 1, **made.draw})
    directory = tmp_path_factory.mktemp(case)
    model.save_pretrained(directory, **made.save)
    path = directory / "config.json"
    written = {**json.loads(path.read_text()), **made.rewrite}
    path.write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    if made.short_factor is not None:
        model.config.rope_parameters["short_factor"] = made.short_factor
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return Reference.of_model(directory, model)


@pytest.mark.parametrize("mode", MODES)
def test_n1_greedy_equals_transformers(reference: Reference, case: str, mode: str, count: Callable[..., int]) -> None:
    is_main = case.startswith(("qwen", "gemma"))
    num_new, num_prompts = count(24, full=256 if is_main else 64), count(8, full=64 if is_main else 32)
    settings = {"block_size": BLOCK_SIZE, **MODES[mode]}
    stats = check_greedy(reference, prompts_for(SMALL["vocab_size"], num_prompts), num_new, **settings)
    assert (stats.num_prefix_hits > 0) == ("rounds" in settings)


def test_logits_equal_transformers(reference: Reference) -> None:
    check_logits(reference, *prompts_for(SMALL["vocab_size"], 1))


def test_a_wrong_position_window_or_head_would_show(reference: Reference, case: str) -> None:
    check_faults_show(reference, *prompts_for(SMALL["vocab_size"], 1), is_windowed=CASES[case].is_windowed)
