"""N1 for Baichuan and ChatGLM, whose code transformers does not ship, against plain PyTorch.

The references below are written from the papers and configs alone and share no line with the engine: one sequence, no
cache, a loop over heads, in double precision. Weights are a dict by checkpoint name.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from fairlead import LLM
from fairlead.errors import ModelError
from fairlead.testing.reference import Reference, check_faults_show, check_greedy, check_logits, prompts_for

Weights = dict[str, torch.Tensor]


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slope: float = 0.0) -> torch.Tensor:
    """One head: (T, D) each; scores get slope * (key - query position)."""
    at = torch.arange(q.shape[0])
    scores = q @ k.T / math.sqrt(q.shape[1]) + slope * (at[None, :] - at[:, None])
    return scores.masked_fill(at[None, :] > at[:, None], -torch.inf).softmax(-1) @ v


def turn(x: torch.Tensor, pairs: list[tuple[int, int]], base: float) -> torch.Tensor:
    """Rotates pair i of dimensions by position * base ** (-i / number of pairs), as complex numbers.

    Angles are rounded to float32, and frequencies before them, as in the published code.
    """
    out = x.clone()
    frequencies = 1.0 / base ** (torch.arange(len(pairs)) / len(pairs))
    for i, (a, b) in enumerate(pairs):
        angle = (torch.arange(x.shape[0]) * frequencies[i]).double()
        turned = torch.complex(x[:, a], x[:, b]) * torch.polar(torch.ones_like(angle), angle)
        out[:, a], out[:, b] = turned.real, turned.imag
    return out


def slope_of(head: int, num_heads: int) -> float:
    """Press et al. (2021), for a power of two heads and for others."""
    n = 1
    while 2 * n <= num_heads:
        n *= 2
    if head < n:
        return 2 ** (-8 * (head + 1) / n)
    return 2 ** (-8 * (2 * (head - n) + 1) / (2 * n))


def baichuan(config: dict[str, Any], w: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V)."""
    H, E, eps = config["num_attention_heads"], config["hidden_size"], config["rms_norm_eps"]
    D, is_rotary = E // H, "max_position_embeddings" in config
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        h = rms(x, w[p + "input_layernorm.weight"], eps)
        q, k, v = (part @ h.T for part in w[p + "self_attn.W_pack.weight"].split(E))
        heads = []
        for head in range(H):
            one = [t[head * D : (head + 1) * D].T for t in (q, k, v)]
            if is_rotary:
                pairs = [(j, j + D // 2) for j in range(D // 2)]
                one[:2] = [turn(t, pairs, 10000.0) for t in one[:2]]
            heads.append(attend(*one, slope=0.0 if is_rotary else slope_of(head, H)))
        x = x + torch.cat(heads, 1) @ w[p + "self_attn.o_proj.weight"].T
        h = rms(x, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = h @ w[p + "mlp.gate_proj.weight"].T, h @ w[p + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down_proj.weight"].T
    head_weight = w["lm_head.weight"]
    if "z_loss_weight" in config:
        head_weight = functional.normalize(head_weight)
    return rms(x, w["model.norm.weight"], eps) @ head_weight.T


def chatglm(config: dict[str, Any], w: Weights, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V)."""
    H, D, eps = config["num_attention_heads"], config["kv_channels"], config["layernorm_epsilon"]
    K = config["multi_query_group_num"] if config["multi_query_attention"] else H
    base = 10000.0 * config.get("rope_ratio", 1)
    pairs = [(2 * j, 2 * j + 1) for j in range(D // 4)]
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for i in range(config["num_layers"]):
        p = f"transformer.encoder.layers.{i}."
        h = rms(x, w[p + "input_layernorm.weight"], eps)
        qkv = h @ w[p + "self_attention.query_key_value.weight"].T + w[p + "self_attention.query_key_value.bias"]
        heads = []
        for head in range(H):
            group = head // (H // K)
            starts = (head * D, (H + group) * D, (H + K + group) * D)
            q, k, v = (qkv[:, s : s + D] for s in starts)
            heads.append(attend(turn(q, pairs, base), turn(k, pairs, base), v))
        x = x + torch.cat(heads, 1) @ w[p + "self_attention.dense.weight"].T
        h = rms(x, w[p + "post_attention_layernorm.weight"], eps)
        gate, up = (h @ w[p + "mlp.dense_h_to_4h.weight"].T).chunk(2, dim=1)
        x = x + (gate * torch.sigmoid(gate) * up) @ w[p + "mlp.dense_4h_to_h.weight"].T
    x = rms(x, w["transformer.encoder.final_layernorm.weight"], eps)
    return x @ w["transformer.output_layer.weight"].T


BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "model_max_length": 512,
    "tie_word_embeddings": False,
}
CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "padded_vocab_size": 128,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "seq_length": 512,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "tie_word_embeddings": False,
}
CASES: dict[str, dict[str, Any]] = {
    "baichuan-7b": BAICHUAN | {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 512},
    "baichuan-13b": BAICHUAN,
    "baichuan-13b-6-heads": BAICHUAN | {"num_attention_heads": 6, "hidden_size": 96},
    "baichuan2-7b": BAICHUAN | {"max_position_embeddings": 512, "z_loss_weight": 0},
    "baichuan2-13b": BAICHUAN | {"z_loss_weight": 0},
    "chatglm3": CHATGLM | {"architectures": ["ChatGLMForConditionalGeneration"]},
    "chatglm-one-group-each": CHATGLM | {"multi_query_attention": False},
    "glm-4": CHATGLM | {"rope_ratio": 500, "kv_channels": 24},
}
MODES: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks of 16": {"max_num_batched_tokens": 16},
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its name."""
    E = config["hidden_size"]
    if config["model_type"] == "baichuan":
        V, F = config["vocab_size"], config["intermediate_size"]
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, E), "lm_head.weight": (V, E)}
        found["model.norm.weight"] = (E,)
        for i in range(config["num_hidden_layers"]):
            p = f"model.layers.{i}."
            found |= {p + "self_attn.W_pack.weight": (3 * E, E), p + "self_attn.o_proj.weight": (E, E)}
            found |= {p + f"mlp.{n}_proj.weight": (F, E) for n in ("gate", "up")} | {p + "mlp.down_proj.weight": (E, F)}
            found |= {p + f"{n}_layernorm.weight": (E,) for n in ("input", "post_attention")}
        return found
    V, F, D, H = (config[n] for n in ("padded_vocab_size", "ffn_hidden_size", "kv_channels", "num_attention_heads"))
    K = config["multi_query_group_num"] if config["multi_query_attention"] else H
    found = {"transformer.embedding.word_embeddings.weight": (V, E), "transformer.output_layer.weight": (V, E)}
    found |= {"transformer.encoder.final_layernorm.weight": (E,), "transformer.rotary_pos_emb.inv_freq": (D // 4,)}
    for i in range(config["num_layers"]):
        p = f"transformer.encoder.layers.{i}."
        found[p + "self_attention.query_key_value.weight"] = ((H + 2 * K) * D, E)
        found[p + "self_attention.query_key_value.bias"] = ((H + 2 * K) * D,)
        found[p + "self_attention.dense.weight"] = (E, H * D)
        found |= {p + "mlp.dense_h_to_4h.weight": (2 * F, E), p + "mlp.dense_4h_to_h.weight": (E, F)}
        found |= {p + f"{n}_layernorm.weight": (E,) for n in ("input", "post_attention")}
    return found


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int) -> Path:
    """Random weights by the recipe of fairlead.testing.tiny_model, with less gain: rounding errors grow with it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        drawn = torch.randn(shape, generator=generator)
        if shape[0] == 128 and any(part in name for part in ("embed", "lm_head", "output_layer")):
            drawn = functional.normalize(drawn, dim=1) * math.sqrt(shape[1]) / 2
        elif len(shape) == 1:
            drawn = 0.3 * drawn if name.endswith("bias") else 1 + 0.2 * drawn
        else:
            drawn *= (2.0 if "W_pack" in name or "query" in name else 1.0) * shape[1] ** -0.5
        tensors[name] = drawn
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="module", params=CASES)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


@pytest.fixture(scope="module")
def reference(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = write_checkpoint(tmp_path_factory.mktemp(config["model_type"]), config, seed=4)
    weights = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
    forward = baichuan if config["model_type"] == "baichuan" else chatglm
    return Reference(directory=directory, logits=lambda ids_1T: forward(config, weights, ids_1T[0])[None].float())


@pytest.mark.parametrize("mode", MODES)
def test_n1_greedy_equals_the_plain_reference(reference: Reference, mode: str, count: Callable[..., int]) -> None:
    check_greedy(reference, prompts_for(128, count(8, full=32), count(80, full=300)), count(24, full=64), **MODES[mode])


def test_logits_equal_the_plain_reference(reference: Reference) -> None:
    check_logits(reference, *prompts_for(128, 1))


def test_a_wrong_position_or_head_would_show(reference: Reference, config: dict[str, Any]) -> None:
    is_rotary = config["model_type"] == "chatglm" or "max_position_embeddings" in config
    check_faults_show(reference, *prompts_for(128, 1), has_positions=is_rotary)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BAICHUAN | {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        (BAICHUAN | {"num_key_value_heads": 2}, "num_key_value_heads 2"),
        (BAICHUAN | {"tie_word_embeddings": True}, "tie_word_embeddings True"),
        (CHATGLM | {"original_rope": False}, "original_rope False"),
        (CHATGLM | {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        (CHATGLM | {"pre_seq_len": 128}, "pre_seq_len 128"),
        (CHATGLM | {"quantization_bit": 4}, "quantization_bit 4"),
        (CHATGLM | {"num_layers": None}, "num_hidden_layers must be an integer from 1"),
    ],
)
def test_a_setting_that_is_not_served_is_refused(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match=reason):
        LLM(str(tmp_path), dtype="float32", skip_tokenizer_init=True, max_model_len=64)
