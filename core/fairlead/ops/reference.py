"""The meaning of every op, in plain PyTorch: the fallback of a new platform and the oracle of every kernel.

Shapes: T packed tokens of a step, N rows of any kind, H query heads, K kv-heads, D head size, E model width,
F feed-forward width, V vocabulary, S sequences, B blocks of a table, P positions, X experts, R experts of a token (of
sampling: rows; of LoRA: rank), G groups of experts, L adapters, I inputs, O outputs.
Inputs are not changed and results are new tensors, unless a docstring says otherwise. Reductions run in float32.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from fairlead.interface import AttentionSpec, MoeSpec

NUM_CANDIDATES = 512  # enough for nearly every top_p or min_p; to sort all of V = 128k takes 20 times as long


def embedding(token_ids_T: torch.Tensor, weight_VE: torch.Tensor) -> torch.Tensor:
    """Rows of the embedding matrix, (T, E). `token_ids_T` is int64 and within the vocabulary."""
    return functional.embedding(token_ids_T, weight_VE)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (N, in) times weight (out, in) transposed, plus bias (out): (N, out) in x's dtype."""
    return functional.linear(x, weight, bias)


def rms_norm(x_NE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x², over E) + eps) * weight, normalised in float32, rounded to x's dtype, then scaled.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.
    """
    x32 = x_NE.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return weight_E * normed.to(x_NE.dtype)


def fused_add_rms_norm(
    x_NE: torch.Tensor, residual_NE: torch.Tensor, weight_E: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), the sum rounded to x's dtype before it is normalised."""
    total = x_NE + residual_NE
    return rms_norm(total, weight_E, eps), total


def gemma_rms_norm(x_NE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x², over E) + eps) * (1 + weight), all in float32, rounded to x's dtype at the end."""
    x32 = x_NE.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight_E.float())).to(x_NE.dtype)


def layer_norm(x_NE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over E. Source: Ba et al., "Layer Normalization" (2016)."""
    return functional.layer_norm(x_NE, (x_NE.shape[-1],), weight_E, bias_E, eps)


def rotary_embedding(
    q_THD: torch.Tensor,
    k_TKD: torch.Tensor,
    positions_T: torch.Tensor,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q and k by their positions, dimension i paired with i + D/2; returns the rotated (q, k).

    `cos_PD` and `sin_PD` hold the table of every position in q's dtype, both halves alike. With `interleaved`, 2i is
    paired with 2i + 1, and the table has equal values side by side instead.
    Source: Su et al., "RoFormer" (2021), section 3.4.2 (interleaved, as in GPT-J); the halves are GPT-NeoX's layout.
    """
    cos_T1D, sin_T1D = cos_PD[positions_T].unsqueeze(1), sin_PD[positions_T].unsqueeze(1)
    turn = _rotate_pairs if interleaved else _rotate_half
    return q_THD * cos_T1D + turn(q_THD) * sin_T1D, k_TKD * cos_T1D + turn(k_TKD) * sin_T1D


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_pairs(x: torch.Tensor) -> torch.Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def silu_and_mul(x_N2F: torch.Tensor) -> torch.Tensor:
    """silu of the first half of each row times the second half: (N, F). Source: Shazeer, "GLU Variants" (2020)."""
    gate, up = x_N2F.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_and_mul(x_N2F: torch.Tensor) -> torch.Tensor:
    """gelu (tanh form) of the first half of each row times the second half: (N, F)."""
    gate, up = x_N2F.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def moe(
    x_TE: torch.Tensor,
    logits_TX: torch.Tensor,
    correction_X: torch.Tensor | None,
    gate_up_X2FE: torch.Tensor,
    down_XEF: torch.Tensor,
    spec: MoeSpec,
) -> torch.Tensor:
    """Each token through its best experts, gated MLPs with silu, summed by their weights: (T, E) in x's dtype.

    Tokens are sorted by expert, so that each expert is one product over a run of rows. The sum is in float32.
    Source: Shazeer et al., "Outrageously Large Neural Networks" (2017), section 2.
    """

    def run_expert(expert: int, rows_NE: torch.Tensor) -> torch.Tensor:
        return linear(silu_and_mul(linear(rows_NE, gate_up_X2FE[expert], None)), down_XEF[expert], None)

    return moe_by_expert(x_TE, logits_TX, correction_X, spec, run_expert)


def moe_by_expert(
    x_TE: torch.Tensor,
    logits_TX: torch.Tensor,
    correction_X: torch.Tensor | None,
    spec: MoeSpec,
    run_expert: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """`moe` with experts that are any function of (expert, its rows (N, E)); rows come in any number above 0."""
    weights_TR, experts_TR = route_tokens(logits_TX, correction_X, spec)
    order_N = experts_TR.flatten().argsort(stable=True)
    tokens_N = order_N // spec.top_k
    counts_X = torch.bincount(experts_TR.flatten(), minlength=spec.num_experts)
    rows_by_expert = torch.split(x_TE[tokens_N], counts_X.tolist())
    parts = [run_expert(i, rows_NE) for i, rows_NE in enumerate(rows_by_expert) if len(rows_NE)]
    weighted_NE = torch.cat(parts).float() * weights_TR.flatten()[order_N, None]
    return torch.zeros_like(x_TE, dtype=torch.float32).index_add_(0, tokens_N, weighted_NE).to(x_TE.dtype)


def route_tokens(
    logits_TX: torch.Tensor, correction_X: torch.Tensor | None, spec: MoeSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, experts) of each token, both (T, R), in float32 and int64. See MoeSpec.

    `correction_X` is added to the scores for the choice alone, not for the weights.
    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing" (2024), section 3 (the correction).
    """
    logits32 = logits_TX.float()
    scores_TX = logits32.softmax(-1) if spec.scoring == "softmax" else logits32.sigmoid()
    choice_TX = scores_TX if correction_X is None else scores_TX + correction_X
    if spec.top_groups < spec.num_groups:
        by_group_TGX = choice_TX.view(len(choice_TX), spec.num_groups, -1)
        group_scores_TG = by_group_TGX.topk(spec.group_top, dim=-1).values.sum(-1)
        best_TG = group_scores_TG.topk(spec.top_groups, dim=-1).indices
        is_out_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_TG, False)
        choice_TX = by_group_TGX.masked_fill(is_out_TG.unsqueeze(-1), -torch.inf).flatten(1)
    experts_TR = choice_TX.topk(spec.top_k, dim=-1).indices
    weights_TR = scores_TX.gather(1, experts_TR)
    if spec.normalize:
        weights_TR = weights_TR / (weights_TR.sum(-1, keepdim=True) + 1e-20)
    return weights_TR * spec.scale, experts_TR


def apply_token_bitmask(logits_SV: torch.Tensor, bitmask_SW: torch.Tensor) -> torch.Tensor:
    """The logits, with -inf for tokens that are not allowed: (S, V). Bit i % 32 of the int32 word i // 32 is token i.

    There may be more words (W of them) than V needs; the bits beyond V say nothing.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=bitmask_SW.device)
    is_allowed_SV = (bitmask_SW.unsqueeze(-1) >> shifts & 1).flatten(1)[:, : logits_SV.shape[1]].bool()
    return logits_SV.masked_fill(~is_allowed_SV, -torch.inf)


def apply_penalties(
    logits_SV: torch.Tensor,
    index_N: torch.Tensor,
    repetition_N: torch.Tensor,
    frequency_N: torch.Tensor,
    presence_N: torch.Tensor,
) -> None:
    """Changes a contiguous float32 (S, V) in place, at N flat places (int64, each once), and nowhere else.

    A positive logit is divided by the repetition penalty, another multiplied; then frequency (times its count already)
    and presence are subtracted. Infinite logits stay, finite ones stay finite.
    Source: Keskar et al., "CTRL" (2019), section 4.1, with the sign rule of transformers (repetition); the order is
    vLLM's.
    """
    old_N = logits_SV.view(-1)[index_N]
    new_N = torch.where(old_N > 0, old_N / repetition_N, old_N * repetition_N)
    most = torch.finfo(torch.float32).max
    new_N = (new_N - frequency_N - presence_N).clamp_(-most, most)
    logits_SV.view(-1)[index_N] = torch.where(old_N.isfinite(), new_N, old_N)


def draw(probs_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """One token per row (R,) int64, by inversion of the cumulative distribution: the first token whose cumulative
    probability exceeds `uniform_R` (float64, in [0, 1)) times the row's sum; never one of probability 0.

    Sums run in float64, so that the same token is drawn everywhere but where two are within 1e-12 of the threshold.
    """
    return _invert(probs_RV.double().cumsum(-1), uniform_R[:, None])[:, 0]


def draw_filtered(probs_RV: torch.Tensor, settings_4R: torch.Tensor, max_top_k: int) -> torch.Tensor:
    """One token per row (R,) int64 from what top_k, top_p and min_p leave, drawn as by `draw`, best tokens first.

    The rows of `settings_4R` (float64) are top_k (0 or V and more: off), top_p (1: off), min_p (0: off) and uniform;
    `max_top_k` is the largest top_k that is on, or 0.
    Equal probabilities rank by token id. top_k keeps exactly k tokens; top_p keeps the smallest set whose share of
    what top_k left reaches p; min_p keeps tokens of at least min_p times the best one's probability. So a row keeps
    its n best tokens, for which a few candidates are sorted, and all tokens only in rows where those do not suffice.
    """
    num_tokens = probs_RV.shape[1]
    longest = max(max_top_k, NUM_CANDIDATES)
    if longest >= num_tokens:
        return _draw_best(probs_RV, settings_4R, num_tokens)[0]
    tokens_R, is_cut_off_R = _draw_best(probs_RV, settings_4R, longest)
    if is_cut_off_R.any():
        tokens_R[is_cut_off_R] = _draw_best(probs_RV[is_cut_off_R], settings_4R[:, is_cut_off_R], num_tokens)[0]
    return tokens_R


def _invert(cumulative_RV: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """The first place whose cumulative probability exceeds the threshold: never one of probability 0."""
    threshold_R1 = uniform_R1 * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, threshold_R1, right=True).clamp_(max=cumulative_RV.shape[1] - 1)


def _draw_best(probs_RV: torch.Tensor, settings_4R: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from the `width` best tokens W; returns the tokens and which rows would have kept more than W."""
    num_tokens = probs_RV.shape[1]
    top_k_R1, top_p_R1, min_p_R1, uniform_R1 = settings_4R.unsqueeze(-1)
    has_top_k_R1 = (top_k_R1 > 0) & (top_k_R1 < num_tokens)
    best_RW = probs_RV.topk(width).values if width < num_tokens else probs_RV.sort(dim=-1, descending=True).values
    rank_W = torch.arange(width, device=probs_RV.device)
    is_kept_RW = (rank_W < top_k_R1) | ~has_top_k_R1
    best_RW = best_RW.double().masked_fill_(~is_kept_RW, 0.0)
    cumulative_RW = best_RW.cumsum(-1)
    mass_R1 = torch.where(has_top_k_R1, cumulative_RW[:, -1:], 1.0)
    is_kept_RW &= (cumulative_RW - best_RW < top_p_R1 * mass_R1) | (top_p_R1 == 1)
    is_kept_RW &= best_RW >= min_p_R1 * best_RW[:, :1]
    is_kept_RW[:, 0] = True
    place_R1 = _invert(best_RW.masked_fill(~is_kept_RW, 0.0).cumsum(-1), uniform_R1)
    # The place among the sorted ones becomes a token: the n-th of those that have this very probability.
    value_R1 = best_RW.gather(1, place_R1)
    nth_R1 = place_R1 - (best_RW > value_R1).sum(-1, keepdim=True) + 1
    count_RV = (probs_RV == value_R1.float()).cumsum(-1, dtype=torch.int32)
    tokens_R1 = torch.searchsorted(count_RV, nth_R1.int()).clamp_(max=num_tokens - 1)
    return tokens_R1[:, 0], is_kept_RW.all(-1) & ~has_top_k_R1[:, 0]


def lora_shrink(x_NI: torch.Tensor, a_LRI: torch.Tensor, adapter_N: torch.Tensor) -> torch.Tensor:
    """Each row by the first matrix of its adapter: (N, R) in float32. `adapter_N` (int64) is below L.

    Adapter 0 is all zeros: that of rows without one, which a kernel may pass over.
    Source: Hu et al., "LoRA" (2021), equation 3; Chen et al., "Punica" (2023), section 4 (rows of mixed adapters).
    """
    return torch.einsum("ni,nri->nr", x_NI.float(), a_LRI[adapter_N].float())


def lora_expand(y_NO: torch.Tensor, h_NR: torch.Tensor, b_LOR: torch.Tensor, adapter_N: torch.Tensor) -> torch.Tensor:
    """y plus what `lora_shrink` gave by the second matrix of each row's adapter, (N, O) in y's dtype.

    The matrices hold the adapter's scale already. The sum is in float32. Rows of adapter 0 are y's, bit by bit.
    """
    return (y_NO.float() + torch.einsum("nr,nor->no", h_NR, b_LOR[adapter_N].float())).to(y_NO.dtype)


def kv_cache_write(x_TKD: torch.Tensor, cache: torch.Tensor, slot_mapping_T: torch.Tensor) -> None:
    """Stores row t in slot `slot_mapping_T[t]` (int64) of a cache of shape (slots, K, D), in place."""
    cache[slot_mapping_T] = x_TKD.to(cache.dtype)


def paged_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    query_lens_S: list[int],
    seq_lens_S: list[int],
    block_tables_SB: torch.Tensor,
    block_size: int,
    spec: AttentionSpec,
) -> torch.Tensor:
    """Causal attention of each sequence's new queries over its paged context: (T, H, D of the values) in q's dtype.

    The queries of sequence i are the last `query_lens_S[i]` positions of its `seq_lens_S[i]` tokens. Caches have
    shape (slots, K, D); they may be the same. One sequence after the other, in float32: the oracle, not the fast way.
    Source: Kwon et al., "PagedAttention" (SOSP 2023), equation 4; for the variants see AttentionSpec.
    """
    value_size = spec.value_size or spec.head_size
    out_THD = q_THD.new_empty((q_THD.shape[0], q_THD.shape[1], value_size))
    group = spec.num_heads // spec.num_kv_heads
    start = 0
    for i, (num_queries, num_tokens) in enumerate(zip(query_lens_S, seq_lens_S, strict=True)):
        first = num_tokens - num_queries
        low = 0 if spec.sliding_window is None else max(0, first - spec.sliding_window + 1)
        key_L = torch.arange(low, num_tokens, device=q_THD.device)
        query_Q1 = torch.arange(first, num_tokens, device=q_THD.device)[:, None]
        slots_L = block_tables_SB[i].long()[key_L // block_size] * block_size + key_L % block_size
        k_LHD = k_cache[slots_L].float().repeat_interleave(group, dim=1)
        v_LHD = v_cache[slots_L, :, :value_size].float().repeat_interleave(group, dim=1)
        q_QHD = q_THD[start : start + num_queries].float()
        scores_HQL = torch.einsum("qhd,lhd->hql", q_QHD, k_LHD) * spec.scale
        if spec.soft_cap is not None:
            scores_HQL = spec.soft_cap * torch.tanh(scores_HQL / spec.soft_cap)
        if spec.alibi_slopes is not None:
            slopes_H11 = torch.tensor(spec.alibi_slopes, device=q_THD.device)[:, None, None]
            scores_HQL = scores_HQL + slopes_H11 * (key_L - query_Q1)
        hidden_QL = key_L > query_Q1
        if spec.sliding_window is not None:
            hidden_QL |= key_L <= query_Q1 - spec.sliding_window
        probs_HQL = scores_HQL.masked_fill(hidden_QL, -torch.inf).softmax(-1)
        out_THD[start : start + num_queries] = torch.einsum("hql,lhd->qhd", probs_HQL, v_LHD).to(q_THD.dtype)
        start += num_queries
    return out_THD
