"""Qwen 1.5, 2 and 2.5: Llama with biases on q, k and v, and sliding windows in the upper layers where asked for.

Source: "Qwen2 Technical Report" (2024), section 2.2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fairlead.layers.decoder import AttentionOptions
from fairlead.models.config import layer_windows, positive_int, refuse
from fairlead.models.llama import LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 32768, "sliding_window": 4096}

    def attention_options(self, index: int) -> AttentionOptions:
        refuse(self.config, "use_mrope", False)
        window = qwen_windows(self.config, self.shape.num_layers)[index]
        return replace(super().attention_options(index), qkv_bias=True, output_bias=False, sliding_window=window)


def qwen_windows(config: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window: none at all unless use_sliding_window, else from layer max_window_layers on."""
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    first = positive_int({"max_window_layers": 28, **config}, "max_window_layers") if window is not None else 0
    return layer_windows({**config, "sliding_window": window}, num_layers, lambda i: window is not None and i >= first)
