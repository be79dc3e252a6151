"""DeepSeek-V2 and V3: multi-head latent attention over a compressed cache, and many small experts.

Sources: DeepSeek-AI, "DeepSeek-V2" (2024), section 2; "DeepSeek-V3 Technical Report" (2024), section 2.1.
Shapes: T packed tokens, H heads, E model width; a head's query and key are N entries without position and P rotated
ones, its value V entries; Q and R are the ranks that queries, and keys with values, are compressed to; X experts.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fairlead.errors import CheckpointError
from fairlead.interface import AttentionSpec, MoeSpec
from fairlead.layers.attention import Attention
from fairlead.layers.context import BuildContext, Step
from fairlead.layers.decoder import Mlp, PreNormLayer
from fairlead.layers.feed_forward import gated_mlp
from fairlead.layers.linear import Linear, MergedLinear, PlainWeight
from fairlead.layers.moe import MoE, Router
from fairlead.layers.norm import RMSNorm
from fairlead.layers.rotary import Rotary, context_factor, rope_params, yarn_mscale
from fairlead.models.config import ModelShape, optional_positive_int, positive_int, positive_number, refuse
from fairlead.models.llama import LlamaForCausalLM

_LATENT_EPS = 1e-6  # of the norms within attention; it is not the config's


class DeepseekV2ForCausalLM(LlamaForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {"first_k_dense_replace": 0, "topk_method": "greedy"}
    checkpoint_names: ClassVar[Mapping[str, str]] = {".mlp.shared.": ".mlp.shared_experts."}

    def layer(self, index: int) -> torch.nn.Module:
        E, P = self.shape.hidden_size, positive_int(self.config, "qk_rope_head_dim")
        rotary = self.rotary(rope_params(self.config), head_size=P)
        attention = LatentAttention(self.config, self.shape, rotary, self.ctx)
        return PreNormLayer(attention, self.mlp(index), (self.norm(E), self.norm(E)))

    def mlp(self, index: int) -> Mlp:
        refuse(self.config, "moe_layer_freq", 1)
        if index < (self.config["first_k_dense_replace"] or 0):
            return super().mlp(index)
        refuse(self.config, "hidden_act", "silu")
        spec = self.routing()
        E, F = self.shape.hidden_size, positive_int(self.config, "moe_intermediate_size")
        has_correction = spec.scoring == "sigmoid"
        router = Router(E, spec.num_experts, self.ctx, in_float32=True, has_correction=has_correction)
        moe = MoE(E, F, spec, self.ctx, router=router)
        num_shared = optional_positive_int(self.config, "n_shared_experts")
        if num_shared is not None:
            moe.shared = gated_mlp(E, F * num_shared, "silu", self.ctx)
        return moe

    def routing(self) -> MoeSpec:
        """Softmax scores; the best experts of all, or of the groups that hold the very best one."""
        refuse(self.config, "topk_method", "greedy", "group_limited_greedy")
        refuse(self.config, "scoring_func", "softmax")
        refuse(self.config, "norm_topk_prob", False)
        X = positive_int(self.config, "n_routed_experts")
        groups, top_groups = (1, 1) if self.config["topk_method"] == "greedy" else self.groups(X)
        return MoeSpec(
            num_experts=X,
            top_k=positive_int(self.config, "num_experts_per_tok", most=X // groups * top_groups),
            scale=positive_number(self.config, "routed_scaling_factor", 1.0),
            num_groups=groups,
            top_groups=top_groups,
        )

    def groups(self, num_experts: int) -> tuple[int, int]:
        """(groups of experts, groups of which a token's experts may be)."""
        groups = positive_int(self.config, "n_group", 1)
        if num_experts % groups:
            raise CheckpointError(f"config.json: n_group {groups} does not divide n_routed_experts {num_experts}")
        return groups, positive_int(self.config, "topk_group", 1, most=groups)


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    }

    def routing(self) -> MoeSpec:
        """Sigmoid scores, balanced by a correction; groups are chosen by the sum of their two best experts."""
        refuse(self.config, "topk_method", "noaux_tc")
        refuse(self.config, "scoring_func", "sigmoid")
        X = positive_int(self.config, "n_routed_experts")
        groups, top_groups = self.groups(X)
        return MoeSpec(
            num_experts=X,
            top_k=positive_int(self.config, "num_experts_per_tok", most=X // groups * top_groups),
            scoring="sigmoid",
            normalize=bool(self.config["norm_topk_prob"]),
            scale=positive_number(self.config, "routed_scaling_factor"),
            num_groups=groups,
            top_groups=top_groups,
            group_top=min(2, X // groups),
        )

    @property
    def unused_weights(self) -> tuple[str, ...]:
        """The layers behind the last one predict further tokens ahead; they serve speculation alone."""
        first = self.shape.num_layers
        return tuple(f"model.layers.{first + i}." for i in range(self.config.get("num_nextn_predict_layers") or 0))


class LatentAttention(torch.nn.Module):
    """All heads share one compressed key-value row and one rotated key per token, and nothing else is cached.

    A head's key and value are linear in that row, so both maps are absorbed: into the query before attention, and
    into the output after it. The cached row stands for the key (R + P entries) and, its first R, for the value.
    """

    def __init__(self, config: Mapping[str, Any], shape: ModelShape, rotary: Rotary, ctx: BuildContext) -> None:
        super().__init__()
        H, E = shape.num_heads, shape.hidden_size
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        self.N, self.P, V, self.R = (positive_int(config, name) for name in names)
        Q, bias = optional_positive_int(config, "q_lora_rank"), bool(config.get("attention_bias", False))
        if Q is None:
            refuse(config, "attention_bias", False)
            parts = (("q_proj", H * (self.N + self.P)), ("kv_a_proj_with_mqa", self.R + self.P))
            self.q_a_layernorm = self.q_b_proj = None
        else:
            parts = (("q_a_proj", Q), ("kv_a_proj_with_mqa", self.R + self.P))
            self.q_a_layernorm = RMSNorm(Q, _LATENT_EPS, ctx)
            self.q_b_proj = Linear(Q, H * (self.N + self.P), ctx)
        self.qkv_a_proj = MergedLinear(E, parts, ctx, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.R, _LATENT_EPS, ctx)
        self.kv_b_proj = PlainWeight(self.R, H * (self.N + V), ctx)
        self.o_proj = Linear(H * V, E, ctx, bias=bias)
        self.o_proj.give_residual()
        self.rotary, self.is_interleaved = rotary, bool(config.get("rope_interleave", True))
        scale = (self.N + self.P) ** -0.5 * _temperature(rope_params(config))
        self.attention = Attention(
            AttentionSpec(num_heads=H, num_kv_heads=1, head_size=self.R + self.P, scale=scale, value_size=self.R)
        )

    def forward(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        out_TE: torch.Tensor = self.o_proj(self._attend(x_TE, positions_T, step))
        return out_TE

    def add(
        self, x_TE: torch.Tensor, residual_TE: torch.Tensor, positions_T: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Two tensors whose sum is the result plus the residual; see `Linear.add`."""
        return self.o_proj.add(self._attend(x_TE, positions_T, step), residual_TE)

    def _attend(self, x_TE: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        q, compressed = self.qkv_a_proj(x_TE).split(self.qkv_a_proj.sizes, dim=-1)
        if self.q_a_layernorm is not None and self.q_b_proj is not None:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q_THN, q_THP = q.view(len(q), -1, self.N + self.P).split((self.N, self.P), dim=-1)
        latent_TR, k_TP = compressed.split((self.R, self.P), dim=-1)
        q_THP, k_T1P = self._rotate(q_THP, k_TP.unsqueeze(1), positions_T)

        to_key_HNR, to_value_HVR = self._absorbed()
        q_THR = torch.einsum("thn,hnr->thr", q_THN, to_key_HNR)
        latent_T1R = self.kv_a_layernorm(latent_TR).unsqueeze(1)
        keys = torch.cat((latent_T1R, k_T1P), dim=-1)
        out_THR = self.attention(torch.cat((q_THR, q_THP), dim=-1), keys, None, step)
        out_THV = torch.einsum("thr,hvr->thv", out_THR, to_value_HVR)
        return out_THV.flatten(1)

    def _absorbed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of kv_b_proj: what makes keys (H, N, R) and what makes values (H, V, R) of a compressed row."""
        weight = self.kv_b_proj.weight.view(self.attention.spec.num_heads, -1, self.R)
        return weight[:, : self.N], weight[:, self.N :]

    def _rotate(
        self, q_THP: torch.Tensor, k_T1P: torch.Tensor, positions_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Neighbours are paired in checkpoints, halves in our table: scores do not see the order of entries."""
        if self.is_interleaved:
            q_THP, k_T1P = (torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1) for x in (q_THP, k_T1P))
        rotated: tuple[torch.Tensor, torch.Tensor] = self.rotary(q_THP, k_T1P, positions_T)
        return rotated


def _temperature(params: Mapping[str, Any]) -> float:
    """YaRN's factor on the scores, which DeepSeek applies in full and not through the rotation."""
    if params["rope_type"] == "default" or not params.get("mscale_all_dim"):
        return 1.0
    return yarn_mscale(context_factor(params), params["mscale_all_dim"]) ** 2
