"""N1 for GPT-2, OPT, GPT-NeoX, GPT-J, Phi and Falcon against transformers, in every layout of theirs."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairlead import LLM
from fairlead.errors import ModelError
from fairlead.testing.reference import Reference, check_faults_show, check_greedy, check_logits, prompts_for
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint

MODES: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks of 16": {"max_num_batched_tokens": 16},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout.

    transformers rounds Falcon's ALiBi to bfloat16, exactly up to position 256 only, and its eager code adds it twice.
    """

    model_type: str
    seed: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    longest: int = 300
    attention: str = "eager"
    gain: float = 1.5  # of the weights; float32's own rounding grows with it


CASES = {
    "gpt2": Case(model_type="gpt2", seed=4),
    "gpt2-scaled-untied": Case(
        model_type="gpt2",
        settings={
            "scale_attn_by_inverse_layer_idx": True,
            "scale_attn_weights": False,
            "n_inner": 96,
            "tie_word_embeddings": False,
            "activation_function": "relu",
        },
    ),
    "opt": Case(model_type="opt", seed=3, settings={"ffn_dim": 32}),
    "opt-350m": Case(
        model_type="opt",
        seed=2,
        settings={"do_layer_norm_before": False, "word_embed_proj_dim": 32, "ffn_dim": 32},
    ),
    "opt-plain": Case(
        model_type="opt",
        settings={"enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True},
    ),
    "gpt_neox": Case(model_type="gpt_neox"),
    "gpt_neox-sequential": Case(
        model_type="gpt_neox",
        gain=1.0,
        settings={
            "use_parallel_residual": False,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        },
    ),
    "gptj": Case(model_type="gptj"),
    "phi": Case(model_type="phi", seed=3),
    "phi-grouped": Case(model_type="phi", settings={"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "falcon-7b": Case(model_type="falcon", gain=1.0),
    "falcon-40b": Case(model_type="falcon", settings={"new_decoder_architecture": True, "num_kv_heads": 2}, gain=1.0),
    "falcon-11b": Case(
        model_type="falcon",
        settings={
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
    ),
    "falcon-rw": Case(
        model_type="falcon",
        seed=4,
        settings={"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        longest=190,
        attention="sdpa",
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def reference(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp(case.model_type)
    write_tiny_checkpoint(directory, case.model_type, seed=case.seed, settings=case.settings, gain=case.gain)
    return Reference.of_transformers(directory, case.attention)


@pytest.mark.parametrize("mode", MODES)
def test_n1_greedy_equals_transformers(reference: Reference, case: Case, mode: str, count: Callable[..., int]) -> None:
    prompts = prompts_for(512, count(8, full=32), min(case.longest, count(80, full=300)))
    check_greedy(reference, prompts, count(24, full=64), **MODES[mode])


def test_logits_equal_transformers(reference: Reference, case: Case) -> None:
    check_logits(reference, *prompts_for(512, 1, case.longest))


def test_a_wrong_position_or_head_would_show(reference: Reference, case: Case) -> None:
    check_faults_show(reference, *prompts_for(512, 1, case.longest), has_positions=not case.settings.get("alibi"))


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"activation_function": "swish9"}, "activation_function 'swish9'"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("gptj", {"rotary_dim": 7}, "must be an even number"),
        ("gptj", {"rotary_dim": None}, "rotary_dim must be an integer from 1"),
        ("gptj", {"rotary_dim": 64}, "rotary_dim 64 exceeds the head size 16"),
        ("falcon", {"head_dim": 32}, "head_dim must be hidden_size / num_attention_heads"),
        ("opt", {"ffn_dim": "wide"}, "ffn_dim must be an integer from 1"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral'"),
    ],
)
def test_a_setting_that_is_not_served_is_refused(
    tmp_path: Path, model_type: str, settings: dict[str, Any], reason: str
) -> None:
    file = write_tiny_checkpoint(tmp_path, model_type) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings), encoding="utf-8")
    with pytest.raises(ModelError, match=reason) as caught:
        LLM(str(tmp_path), dtype="float32", skip_tokenizer_init=True, max_model_len=64)
    assert "\n" not in str(caught.value)


def test_gpt2_as_it_was_first_published(tmp_path: Path) -> None:
    """Without the prefix, with masks among the tensors, and with the config's old names."""
    reference = Reference.of_transformers(write_tiny_checkpoint(tmp_path, "gpt2", seed=1))
    file = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    save_file(tensors, file, metadata={"format": "pt"})
    check_greedy(reference, prompts_for(512, 3, 20), 8)


def test_pythia_as_it_was_first_published(tmp_path: Path) -> None:
    """rotary_pct and rotary_emb_base in the config, tables among the tensors."""
    reference = Reference.of_transformers(write_tiny_checkpoint(tmp_path, "gpt_neox", seed=1))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    file.write_text(json.dumps(config), encoding="utf-8")
    weights = tmp_path / "model.safetensors"
    tables = {
        f"gpt_neox.layers.{i}.attention.{name}": torch.ones(1)
        for i in range(2)
        for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    save_file(load_file(weights) | tables, weights, metadata={"format": "pt"})
    check_greedy(reference, prompts_for(512, 3, 20), 8)


def test_falcon_as_it_was_first_published(tmp_path: Path) -> None:
    """The names of the first RefinedWeb configs."""
    settings = {"new_decoder_architecture": True, "num_kv_heads": 2}
    reference = Reference.of_transformers(write_tiny_checkpoint(tmp_path, "falcon", seed=1, settings=settings))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    old = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_kv_heads": "n_head_kv"}
    config = {old.get(name, name): value for name, value in config.items()} | {"architectures": ["RWForCausalLM"]}
    file.write_text(json.dumps(config), encoding="utf-8")
    check_greedy(reference, prompts_for(512, 3, 20), 8)
