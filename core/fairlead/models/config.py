"""The numbers of a config.json that the engine itself needs. No torch."""

from collections.abc import Mapping
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
            max_positions=positive_int(config, "max_position_embeddings", 2048),
        )


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """config[key], or the default where the key is missing or null; raises CheckpointError if it is no int > 0."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise CheckpointError(f"config.json: {key} must be a positive integer, got {value!r}")
    return value


def refuse(config: Mapping[str, Any], key: str, *served: object) -> None:
    """Raises UnsupportedModelError if config[key] is given and none of the values that are served."""
    value = config.get(key)
    if value is not None and value not in served:
        instead = ", ".join(map(repr, served)) or "leaving it out"
        raise UnsupportedModelError(f"config.json: {key} {value!r} is not supported here; supported: {instead}")


def renamed(config: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The config with some keys under their usual names: renamed(config, n_embd="hidden_size"). Usual ones prevail."""
    usual = {name: config[own] for own, name in names.items() if config.get(own) is not None}
    return usual | {key: value for key, value in config.items() if key not in names}
