"""Rotary positions against transformers, in both spellings of a config.json."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fairlead.errors import CheckpointError, UnsupportedModelError
from fairlead.layers.context import BuildContext
from fairlead.layers.rotary import Rotary, inverse_frequencies, rope_params

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "llama3 of Llama 3.1": {**LLAMA3, "original_max_position_embeddings": 8192},
}


def make_rotary(head_size: int, config: dict[str, Any], max_model_len: int = 600) -> Rotary:
    context = BuildContext.reference(max_model_len=max_model_len)
    return Rotary(head_size, rope_params(config), context)


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 10000])
@pytest.mark.parametrize("head_size", [8, 64, 80, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers(kind: str, head_size: int, theta: float) -> None:
    reference = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * head_size,
            num_attention_heads=4,
            head_dim=head_size,
            max_position_embeddings=131072,
            rope_parameters={"rope_theta": theta, **KINDS[kind]},
        )
    )
    new = {"rope_parameters": {"rope_theta": theta, **KINDS[kind]}}
    old = {"rope_theta": theta, "rope_scaling": KINDS[kind]}
    older = {"rope_theta": theta, "rope_scaling": {**KINDS[kind], "type": KINDS[kind]["rope_type"]}}
    del older["rope_scaling"]["rope_type"]
    positions = torch.arange(600)
    cos, sin = reference(torch.zeros(1), positions[None])
    for config in (new, old, older):
        inv_freq, factor = inverse_frequencies(head_size, rope_params(config), max_model_len=600)
        assert torch.equal(inv_freq, reference.inv_freq)
        assert factor == 1.0
        rotary = make_rotary(head_size, config)
        torch.testing.assert_close(rotary.cos_PD, cos[0], atol=1e-6, rtol=0)
        torch.testing.assert_close(rotary.sin_PD, sin[0], atol=1e-6, rtol=0)


def test_rotation_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(9, 4, 16, generator=generator), torch.randn(9, 2, 16, generator=generator)
    positions = torch.tensor([0, 1, 2, 599, 17, 17, 300, 5, 64])
    rotary = make_rotary(16, {"rope_parameters": LLAMA3})
    found = rotary(q, k, positions)
    cos, sin = rotary.cos_PD[positions][None], rotary.sin_PD[positions][None]
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y[0].transpose(0, 1), atol=1e-6, rtol=0)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 64, generator=generator), torch.randn(1, 1, 64, generator=generator)
    rotary = make_rotary(64, {})

    def score(query_position: int, key_position: int) -> float:
        rotated_q, _ = rotary(q, k, torch.tensor([query_position]))
        _, rotated_k = rotary(q, k, torch.tensor([key_position]))
        return float((rotated_q * rotated_k).sum())

    assert score(10, 3) == pytest.approx(score(507, 500), abs=1e-3)
    assert abs(score(10, 3) - score(10, 4)) > 0.1


@pytest.mark.parametrize(
    "config", [{}, {"rope_scaling": None}, {"rope_parameters": {}}, {"rope_theta": 10000.0}], ids=str
)
def test_settings_left_out(config: dict[str, Any]) -> None:
    found = rope_params(config)
    assert (found["rope_theta"], found["rope_type"], found["partial_rotary_factor"]) == (10000.0, "default", 1.0)


def test_the_config_is_not_changed() -> None:
    config = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope_params(config)
    assert config == {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}


def test_an_unsupported_kind_lists_the_supported() -> None:
    with pytest.raises(UnsupportedModelError, match="rope_type 'ntk' is not supported; supported: default, linear"):
        make_rotary(16, {"rope_scaling": {"rope_type": "ntk", "factor": 2.0}})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        *(
            ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != key}}, key)
            for key in LLAMA3
            if key != "rope_type"
        ),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": "linear"}, "rotary settings"),
        ({"rope_parameters": [1]}, "rotary settings"),
    ],
    ids=str,
)
def test_bad_settings_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        make_rotary(16, config)
