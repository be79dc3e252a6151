"""The sizes that are read from a config.json."""

from typing import Any

import pytest

from fairlead.errors import CheckpointError
from fairlead.models.config import ModelShape, layer_windows

SMALL: dict[str, Any] = {"vocab_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
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
    assert ModelShape.of({**SMALL, **settings}).max_positions == longest


def test_kv_heads_must_divide_the_heads() -> None:
    with pytest.raises(CheckpointError, match="4 attention heads cannot share 3"):
        ModelShape.of({**SMALL, "num_key_value_heads": 3})


def test_layer_types_come_before_the_rule() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert layer_windows({"layer_types": kinds, "sliding_window": 8}, 3, lambda i: True) == (None, 8, None)
    assert layer_windows({"sliding_window": 8}, 3, lambda i: i == 2) == (None, None, 8)
