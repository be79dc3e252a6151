"""Qwen 1.5-MoE, Qwen2-MoE and Qwen3-MoE: Qwen2 and Qwen3 with experts in place of some MLPs.

In the former every token also goes through a gated shared expert.
Sources: "Qwen2 Technical Report" (2024), section 2.2.2; "Qwen3 Technical Report" (2025), section 2.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from fairlead.interface import MoeSpec
from fairlead.layers.context import BuildContext
from fairlead.layers.decoder import AttentionOptions, Mlp
from fairlead.layers.feed_forward import gated_mlp
from fairlead.layers.linear import Linear
from fairlead.layers.moe import MoE
from fairlead.models.config import ModelShape, layer_windows, optional_positive_int, positive_int, refuse
from fairlead.models.llama import LlamaForCausalLM
from fairlead.models.qwen3 import Qwen3ForCausalLM


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "qkv_bias": True,
    }
    checkpoint_names: ClassVar[Mapping[str, str]] = {
        ".shared_gate.": ".shared_expert_gate.",
        ".shared.": ".shared_expert.",
    }

    def attention_options(self, index: int) -> AttentionOptions:
        window = sliding_window(self.config)
        windows = layer_windows(
            {**self.config, "sliding_window": window},
            self.shape.num_layers,
            lambda i: window is not None and i % 2 == 0 and i < positive_int(self.config, "max_window_layers"),
        )
        bias = bool(self.config["qkv_bias"])
        return replace(
            super().attention_options(index), qkv_bias=bias, output_bias=False, sliding_window=windows[index]
        )

    def mlp(self, index: int) -> Mlp:
        if not has_experts(self.config, index):
            return super().mlp(index)
        moe = routed_experts(self.config, self.shape, self.ctx)
        E, F = self.shape.hidden_size, positive_int(self.config, "shared_expert_intermediate_size")
        moe.shared, moe.shared_gate = gated_mlp(E, F, "silu", self.ctx), Linear(E, 1, self.ctx)
        return moe


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    }

    def attention_options(self, index: int) -> AttentionOptions:
        window = sliding_window(self.config)
        windows = layer_windows(
            {**self.config, "sliding_window": window}, self.shape.num_layers, lambda i: window is not None
        )
        return replace(LlamaForCausalLM.attention_options(self, index), sliding_window=windows[index])

    def mlp(self, index: int) -> Mlp:
        if not has_experts(self.config, index):
            return super().mlp(index)
        return routed_experts(self.config, self.shape, self.ctx)


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """The window, if any layer is to have one."""
    return optional_positive_int(config, "sliding_window") if config.get("use_sliding_window", False) else None


def has_experts(config: Mapping[str, Any], index: int) -> bool:
    """Whether this layer has experts rather than one MLP."""
    step = positive_int(config, "decoder_sparse_step", 1)
    return index not in (config.get("mlp_only_layers") or []) and (index + 1) % step == 0


def routed_experts(config: Mapping[str, Any], shape: ModelShape, ctx: BuildContext) -> MoE:
    """The experts of one layer."""
    refuse(config, "hidden_act", "silu")
    X = positive_int(config, "num_experts", config.get("num_local_experts"))
    spec = MoeSpec(
        num_experts=X,
        top_k=positive_int(config, "num_experts_per_tok", most=X),
        normalize=bool(config.get("norm_topk_prob", False)),
    )
    return MoE(shape.hidden_size, positive_int(config, "moe_intermediate_size"), spec, ctx)
