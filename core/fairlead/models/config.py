"""The numbers of a config.json that the engine itself needs. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairlead.config import QUANTIZATIONS
from fairlead.errors import AwaitedFormatError, CheckpointError, UnsupportedModelError

# Far above any model, so that a broken config.json can neither make modules for ever nor overflow a size in bytes.
_MAX_SIZE, _MAX_LAYERS, _MAX_HEADS, _MAX_HEAD_SIZE = 2**24, 2**12, 2**12, 2**12


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
        hidden = positive_int(config, "hidden_size")
        heads = positive_int(config, "num_attention_heads", most=_MAX_HEADS)
        kv_heads = positive_int(config, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise CheckpointError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads")
        return cls(
            vocab_size=positive_int(config, "vocab_size"),
            hidden_size=hidden,
            num_layers=positive_int(config, "num_hidden_layers", most=_MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=positive_int(config, "head_dim", hidden // heads, most=_MAX_HEAD_SIZE),
            max_positions=_max_positions(config),
        )


def _max_positions(config: Mapping[str, Any]) -> int:
    """max_position_embeddings, or what YaRN stretches the original context to, where that is longer."""
    longest = positive_int(config, "max_position_embeddings", 2048)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return longest  # rope_params says what is wrong with it
    if rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("original_max_position_embeddings"):
        stretched = positive_int(rope, "original_max_position_embeddings") * positive_number(rope, "factor", 1)
        return max(longest, int(stretched))
    return longest


def positive_int(config: Mapping[str, Any], key: str, default: int | None = None, *, most: int = _MAX_SIZE) -> int:
    """config[key], or the default where it is missing or null; raises CheckpointError if it is no int in [1, most]."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise CheckpointError(f"config.json: {key} must be an integer from 1 to {most}, got {_shown(value)}")
    return value


def positive_number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """config[key], or the default where it is missing or null; raises CheckpointError if it is no finite number > 0."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 2**127:
        raise CheckpointError(f"config.json: {key} must be a number above 0, got {_shown(value)}")
    return float(value)


def _shown(value: object) -> str:
    try:
        return f"{value!r:.100}"
    except ValueError:  # an integer of thousands of digits
        return "one of too many digits"


def optional_positive_number(config: Mapping[str, Any], key: str) -> float | None:
    """config[key], or None where the key is missing or null; raises CheckpointError if it is no number > 0."""
    return None if config.get(key) is None else positive_number(config, key)


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


def refuse_rounded_weights(config: Mapping[str, Any]) -> None:
    """Raises AwaitedFormatError for a checkpoint whose weights others have rounded (GPTQ, AWQ, FP8, ...)."""
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, Mapping) else found
        raise AwaitedFormatError(
            f"config.json: quantization_config has quant_method {method!r:.60}: published quantisation formats are not "
            f"there yet; take the checkpoint that was not rounded, with --quantization {' or '.join(QUANTIZATIONS)}"
        )


def renamed(config: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """The config with some keys under their usual names: renamed(config, n_embd="hidden_size"). Usual ones prevail."""
    usual = {name: config[own] for own, name in names.items() if config.get(own) is not None}
    return usual | {key: value for key, value in config.items() if key not in names}
