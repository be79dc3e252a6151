"""The numbers of a config.json that the engine itself needs. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairlead.errors import CheckpointError, UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder. `max_positions` is the longest context that it was made for."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Reads and checks the sizes; raises CheckpointError naming the key."""
        hidden, heads = positive_int(config, "hidden_size"), positive_int(config, "num_attention_heads")
        kv_heads = positive_int(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
        return cls(
            vocab_size=positive_int(config, "vocab_size"),
            hidden_size=hidden,
            num_layers=positive_int(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=positive_int(config, "head_dim", hidden // heads),
            max_positions=_max_positions(config),
        )


def _max_positions(config: Mapping[str, Any]) -> int:
    """max_position_embeddings, or what YaRN stretches the original context to, where that is longer."""
    longest = positive_int(config, "max_position_embeddings", 2048)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("original_max_position_embeddings"):
        stretched = positive_int(rope, "original_max_position_embeddings") * positive_number(rope, "factor", 1)
        return max(longest, int(stretched))
    return longest


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """config[key], or the default where the key is missing or null; raises CheckpointError if it is no int > 0."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def positive_number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """config[key], or the default where the key is missing or null; raises CheckpointError if it is no number > 0."""
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise CheckpointError(f"config.json: {key} must be a number above 0, got {value!r}")
    return value


def optional_positive_number(config: Mapping[str, Any], key: str) -> float | None:
    """config[key], or None where the key is missing or null; raises CheckpointError if it is no number > 0."""
    return None if config.get(key) is None else positive_number(config, key)


def at_most(config: Mapping[str, Any], key: str, limit: int, default: int | None = None) -> int:
    """A positive int of at most `limit`; raises CheckpointError."""
    value = positive_int(config, key, default)
    if value > limit:
        raise CheckpointError(f"config.json: {key} must be at most {limit}, got {value}")
    return value


def optional_positive_int(config: Mapping[str, Any], key: str) -> int | None:
    """config[key], or None where the key is missing or null; raises CheckpointError if it is no int > 0."""
    return None if config.get(key) is None else positive_int(config, key)


def layer_windows(
    config: Mapping[str, Any], num_layers: int, is_sliding: Callable[[int], bool]
) -> tuple[int | None, ...]:
    """The sliding window of each layer, or None where it sees all: by layer_types, else by `is_sliding`.

    Raises CheckpointError or UnsupportedModelError naming the key.
    """
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if is_sliding(i) else "full_attention" for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise CheckpointError(f"config.json: layer_types must be a list of {num_layers} names, got {kinds!r}")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(
                f"layer_types {kind!r} is not supported; supported: full_attention, sliding_attention"
            )
    return tuple(positive_int(config, "sliding_window") if k == "sliding_attention" else None for k in kinds)


def refuse(config: Mapping[str, Any], key: str, *served: object) -> None:
    """Raises UnsupportedModelError if config[key] is given and none of the values that are served."""
    value = config.get(key)
    if value is not None and value not in served:
        instead = ", ".join(map(repr, served)) or "leaving it out"
        raise UnsupportedModelError(f"config.json: {key} {value!r} is not supported here; supported: {instead}")
