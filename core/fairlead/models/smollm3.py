"""SmolLM3: Llama with every fourth layer free of positions. (SmolLM 1 and 2 are Llama.)

Sources: Hugging Face, "SmolLM3" (2025); Yang et al., "RoPE to NoPE and Back Again" (2025), section 4.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fairlead.errors import CheckpointError
from fairlead.layers.decoder import AttentionOptions
from fairlead.models.config import layer_windows, positive_int
from fairlead.models.llama import LlamaForCausalLM


class SmolLM3ForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    }

    def attention_options(self, index: int) -> AttentionOptions:
        options, has_rotary = super().attention_options(index), self._has_rotary()
        window = self.config.get("sliding_window") if self.config.get("use_sliding_window", False) else None
        windows = layer_windows(
            {**self.config, "sliding_window": window},
            self.shape.num_layers,
            lambda i: window is not None and not has_rotary[i],
        )
        return replace(options, rotary=options.rotary if has_rotary[index] else None, sliding_window=windows[index])

    def _has_rotary(self) -> list[bool]:
        """Of each layer; no_rope_layers holds 1 where a layer has it."""
        num_layers, given = self.shape.num_layers, self.config.get("no_rope_layers")
        if given is None:
            interval = positive_int(self.config, "no_rope_layer_interval")
            return [(i + 1) % interval != 0 for i in range(num_layers)]
        if not isinstance(given, list) or len(given) != num_layers:
            raise CheckpointError(f"config.json: no_rope_layers must be a list of {num_layers} numbers, got {given!r}")
        return [bool(value) for value in given]
