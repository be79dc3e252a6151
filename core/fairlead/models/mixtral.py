"""Mixtral: Mistral with eight experts in place of each MLP.

Source: Jiang et al., "Mixtral of Experts" (2024), section 2.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from fairlead.interface import MoeSpec
from fairlead.layers.decoder import Mlp
from fairlead.layers.moe import MoE
from fairlead.models.config import positive_int, refuse
from fairlead.models.mistral import MistralForCausalLM


class MixtralForCausalLM(MistralForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        **MistralForCausalLM.defaults,
        "sliding_window": None,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    checkpoint_names: ClassVar[Mapping[str, str]] = {".mlp.": ".block_sparse_moe."}

    def mlp(self, index: int) -> Mlp:
        refuse(self.config, "hidden_act", "silu")
        X = positive_int(self.config, "num_local_experts")
        spec = MoeSpec(num_experts=X, top_k=positive_int(self.config, "num_experts_per_tok", most=X), normalize=True)
        F = positive_int(self.config, "intermediate_size")
        return MoE(self.shape.hidden_size, F, spec, self.ctx, names=("w1", "w3", "w2"))
