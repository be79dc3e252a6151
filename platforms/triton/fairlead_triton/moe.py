"""Mixture of experts without a word between host and device.

Shapes: T tokens, E width, F feed-forward width, X experts, R experts of a token, N = T R rows.
Every sum runs in a fixed order, and a row's products in an order that its tile's size gives: results depend on the
batch only where T crosses `small_tokens` of the tuning table, up to which tiles are small.
"""

import torch

from fairlead.interface import MoeSpec
from fairlead_triton.kernels import moe as kernels
from fairlead_triton.launch import power_of_two
from fairlead_triton.tuning import Settings, Tuning

Tensor = torch.Tensor


class Moe:
    """The op "moe", and the routing that it begins with."""

    def __init__(self, tuning: Tuning) -> None:
        self._order = tuning.of("moe_order")
        self._small, self._large = tuning.of("moe_matmul_small"), tuning.of("moe_matmul")

    def route(self, logits_TX: Tensor, correction_X: Tensor | None, spec: MoeSpec) -> tuple[Tensor, Tensor]:
        """`fairlead.ops.reference.route_tokens`, with experts in int32; of equal experts the first are taken."""
        num_tokens, num_experts = logits_TX.shape
        weights_TR = torch.empty((num_tokens, spec.top_k), dtype=torch.float32, device=logits_TX.device)
        experts_TR = torch.empty((num_tokens, spec.top_k), dtype=torch.int32, device=logits_TX.device)
        if num_tokens:
            block = power_of_two(num_experts)
            kernels.route_kernel[(num_tokens,)](
                logits_TX,
                correction_X,
                weights_TR,
                experts_TR,
                num_experts,
                *logits_TX.stride(),
                spec.scale,
                TOP_K=spec.top_k,
                NUM_GROUPS=spec.num_groups,
                TOP_GROUPS=spec.top_groups,
                GROUP_TOP=spec.group_top,
                SIGMOID=spec.scoring == "sigmoid",
                HAS_CORRECTION=correction_X is not None,
                NORMALIZE=spec.normalize,
                BLOCK=block,
                BLOCK_K=power_of_two(spec.top_k),
                BLOCK_G=power_of_two(spec.num_groups),
                num_warps=max(1, min(block // 64, 4)),
            )
        return weights_TR, experts_TR

    def moe(
        self,
        x_TE: Tensor,
        logits_TX: Tensor,
        correction_X: Tensor | None,
        gate_up_X2FE: Tensor,
        down_XEF: Tensor,
        spec: MoeSpec,
    ) -> Tensor:
        """See the reference. Five launches; the weights may lie in any strides."""
        num_tokens, width = x_TE.shape
        out_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)
        if num_tokens == 0:
            return out_TE
        if x_TE.stride(1) != 1:
            x_TE = x_TE.contiguous()
        weights_TR, experts_TR = self.route(logits_TX, correction_X, spec)
        # float32, which is for comparisons, would spill in large tiles.
        is_small = num_tokens <= self._large["small_tokens"] or x_TE.element_size() > 2
        settings = self._small if is_small else self._large
        order = self._order_rows(experts_TR, spec.num_experts, settings["block_m"])
        hidden_NF = torch.empty((experts_TR.numel(), down_XEF.shape[2]), dtype=x_TE.dtype, device=x_TE.device)
        self._multiply(x_TE, gate_up_X2FE, None, hidden_NF, order, spec.top_k, settings)
        parts_NE = torch.empty((experts_TR.numel(), width), dtype=torch.float32, device=x_TE.device)
        self._multiply(hidden_NF, down_XEF, weights_TR, parts_NE, order, 1, settings)
        block = self._order["sum_block"]
        kernels.sum_experts_kernel[(num_tokens, -(-width // block))](
            parts_NE, out_TE, width, TOP_K=spec.top_k, BLOCK=block, num_warps=4
        )
        return out_TE

    def _order_rows(self, experts_TR: Tensor, num_experts: int, block_m: int) -> tuple[Tensor, Tensor, Tensor]:
        """(rows by tile, experts by tile, number of tiles), of as many tiles as there can be."""
        num_rows = experts_TR.numel()
        max_tiles = min(num_rows, num_experts + num_rows // block_m)
        num_places = max_tiles * block_m
        memory = torch.empty(num_places + max_tiles + 1, dtype=torch.int32, device=experts_TR.device)
        rows, tile_experts = memory[:num_places], memory[num_places : num_places + max_tiles]
        num_tiles = memory[num_places + max_tiles :]
        block = min(self._order["block"], max(power_of_two(num_rows), 16))
        kernels.order_kernel[(num_experts,)](
            experts_TR,
            rows,
            tile_experts,
            num_tiles,
            num_rows,
            BLOCK_M=block_m,
            BLOCK_X=max(power_of_two(num_experts), 16),
            BLOCK=block,
            num_warps=self._order["num_warps"],
        )
        return rows, tile_experts, num_tiles

    def _multiply(
        self,
        x: Tensor,
        weight: Tensor,
        row_weights: Tensor | None,
        out: Tensor,
        order: tuple[Tensor, Tensor, Tensor],
        rows_per_x: int,
        settings: Settings,
    ) -> None:
        num_rows, num_outputs = out.shape
        max_tiles = len(order[1])
        kernels.expert_matmul_kernel[(max_tiles * -(-num_outputs // settings["block_n"]),)](
            x,
            weight,
            row_weights,
            out,
            *order,
            max_tiles,
            num_rows,
            rows_per_x,
            num_outputs,
            x.shape[1],
            x.stride(0),
            *weight.stride(),
            GATED=row_weights is None,
            BLOCK_M=settings["block_m"],
            BLOCK_N=settings["block_n"],
            BLOCK_K=settings["block_k"] * 2 // x.element_size(),
            num_warps=settings["num_warps"],
            num_stages=settings["num_stages"],
        )
