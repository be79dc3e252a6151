"""The sizes of a config.json: read, defaulted, and refused with the key's name."""

from typing import Any

import pytest

from fairlead.errors import CheckpointError
from fairlead.models.config import ModelShape, layer_windows, positive_int, positive_number

CONFIG = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
HUGE = 10**5000


def without(*keys: str) -> dict[str, Any]:
    return {k: v for k, v in CONFIG.items() if k not in keys}


def test_all_sizes_are_read() -> None:
    assert ModelShape.of(CONFIG) == ModelShape(
        vocab_size=128, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_size=32, max_positions=512
    )


def test_missing_and_null_sizes_have_defaults() -> None:
    keys = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    for config in (without(*keys), {**CONFIG, **dict.fromkeys(keys)}):
        shape = ModelShape.of(config)
        assert (shape.num_kv_heads, shape.head_size, shape.max_positions) == (4, 16, 2048)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_missing_size_is_named(key: str) -> None:
    for config in (without(key), {**CONFIG, key: None}):
        with pytest.raises(CheckpointError, match=f"config.json: {key} must be an integer from 1 .* got None"):
            ModelShape.of(config)


@pytest.mark.parametrize(
    "value",
    [0, -1, 1.0, 64.5, "64", True, [64], {}, 2**31, 2**63, HUGE, float("nan")],
    ids=lambda v: "huge" if v is HUGE else None,
)
@pytest.mark.parametrize("key", list(CONFIG))
def test_a_bad_size_is_named(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {key} must be an integer from 1 to ") as error:
        ModelShape.of({**CONFIG, key: value})
    assert len(str(error.value)) < 300


def test_heads_that_cannot_be_shared() -> None:
    with pytest.raises(CheckpointError, match="4 attention heads cannot share 3 key-value heads"):
        ModelShape.of({**CONFIG, "num_key_value_heads": 3})
    with pytest.raises(CheckpointError, match="4 attention heads cannot share 8 key-value heads"):
        ModelShape.of({**CONFIG, "num_key_value_heads": 8})


def test_more_heads_than_width() -> None:
    with pytest.raises(CheckpointError, match="head_dim must be an integer from 1"):
        ModelShape.of({**without("head_dim"), "hidden_size": 2})


def test_more_layers_than_could_be_made() -> None:
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        ModelShape.of({**CONFIG, "num_hidden_layers": 10**6})


def test_positive_int_takes_a_default_and_a_limit() -> None:
    assert positive_int({"a": 3}, "a") == 3
    assert positive_int({}, "a", 5) == positive_int({"a": None}, "a", 5) == 5
    with pytest.raises(CheckpointError, match="a must be an integer from 1 to 9, got 10"):
        positive_int({"a": 10}, "a", most=9)


def test_positive_number() -> None:
    assert positive_number({"a": 3}, "a") == 3.0
    assert positive_number({"a": 1e-6}, "a") == 1e-6
    assert positive_number({"a": None}, "a", 0.5) == 0.5
    for value in (None, 0, -1.0, "1", True, [1], float("nan"), float("inf"), 1e300, HUGE):
        with pytest.raises(CheckpointError, match=r"config\.json: a must be a number above 0"):
            positive_number({"a": value}, "a")


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, 2048),
        ({"max_position_embeddings": 64, "rope_scaling": YARN}, 256),
        ({"max_position_embeddings": 512, "rope_parameters": YARN}, 512),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4.0}}, 64),
    ],
)
def test_the_longest_context(settings: dict[str, Any], longest: int) -> None:
    assert ModelShape.of({**without("max_position_embeddings"), **settings}).max_positions == longest


def test_layer_types_come_before_the_rule() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert layer_windows({"layer_types": kinds, "sliding_window": 8}, 3, lambda i: True) == (None, 8, None)
    assert layer_windows({"sliding_window": 8}, 3, lambda i: i == 2) == (None, None, 8)
