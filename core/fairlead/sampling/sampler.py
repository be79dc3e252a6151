"""Draws one token per row of logits, all rows at once.

A draw needs one uniform number, which is a hash of the sequence's seed and the position of the token. So a request
with a seed gets the same tokens whatever shares its batch, before and after a preemption, and on every restart.

Shapes: S sequences, V vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from fairlead.request import TokenLogprobs
from fairlead.scheduling.batch import SampledToken, ScheduledChunk

_MASK = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """The sampling parameters of a step's rows, on the host; None where no row needs them."""

    temperature_S: np.ndarray | None  # None: every row is greedy
    top_k_S: np.ndarray | None
    top_p_S: np.ndarray | None
    min_p_S: np.ndarray | None
    uniform_S: np.ndarray | None
    num_logprobs: int | None  # the most that any row wants
    logprobs_S: tuple[int | None, ...]

    @classmethod
    def of(cls, chunks: Seq[ScheduledChunk]) -> "SamplingBatch":
        """Collects the parameters of the chunks that sample, in order."""
        params = [c.params for c in chunks]
        wanted = tuple(p.logprobs for p in params)
        num_logprobs = max((k for k in wanted if k is not None), default=None)
        temperature_S = np.array([p.temperature for p in params], dtype=np.float32)
        if not temperature_S.any():
            return cls(
                temperature_S=None,
                top_k_S=None,
                top_p_S=None,
                min_p_S=None,
                uniform_S=None,
                num_logprobs=num_logprobs,
                logprobs_S=wanted,
            )
        top_k_S = np.array([max(p.top_k, 0) for p in params], dtype=np.int64)
        top_p_S = np.array([p.top_p for p in params], dtype=np.float64)
        min_p_S = np.array([p.min_p for p in params], dtype=np.float64)
        seeds = np.array([c.sample_seed for c in chunks], dtype=np.uint64)
        positions = np.array([c.position for c in chunks], dtype=np.uint64)
        return cls(
            temperature_S=temperature_S,
            top_k_S=top_k_S if top_k_S.any() else None,
            top_p_S=top_p_S if (top_p_S < 1).any() else None,
            min_p_S=min_p_S if min_p_S.any() else None,
            uniform_S=uniform(seeds, positions),
            num_logprobs=num_logprobs,
            logprobs_S=wanted,
        )


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each seed and position (uint64), in float64 of 53 random bits.

    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators" (2014), figure 15, applied twice.
    """
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds) + positions * np.uint64(0x9E3779B97F4A7C15))
    fraction: np.ndarray = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fraction


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z + np.uint64(0x9E3779B97F4A7C15)) & _MASK
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(logits_SV: torch.Tensor, batch: SamplingBatch) -> list[SampledToken]:
    """Draws a token for every row; a row that holds NaN gets token_id None and leaves the others as they are.

    Greedy rows take the first of the largest logits. The others: temperature, then top_k, top_p and min_p, each on
    the distribution that the one before left, renormalised. Log-probabilities are those of the unchanged logits.
    """
    best_S, greedy_S = logits_SV.max(dim=-1)
    if batch.temperature_S is None:
        tokens_S = greedy_S
    else:
        drawn_S = _draw(logits_SV, batch)
        is_greedy_S = torch.from_numpy(batch.temperature_S == 0).to(logits_SV.device)
        tokens_S = torch.where(is_greedy_S, greedy_S, drawn_S)
    is_nan: list[bool] = best_S.isnan().tolist()
    token_ids: list[int] = tokens_S.tolist()
    logprobs = _logprobs(logits_SV, tokens_S, batch)
    return [
        SampledToken(token_id=None if nan else token_id, logprobs=None if nan else row)
        for token_id, nan, row in zip(token_ids, is_nan, logprobs, strict=True)
    ]


def _draw(logits_SV: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """One token per row by inversion of the cumulative distribution, summed in float64; greedy rows are ignored."""
    assert batch.temperature_S is not None
    assert batch.uniform_S is not None
    device = logits_SV.device
    # A row of temperature 0 is drawn too, and not used; 1 keeps its arithmetic finite.
    temperature_S = torch.from_numpy(np.where(batch.temperature_S == 0, 1, batch.temperature_S)).to(device)
    shifted_SV = logits_SV - logits_SV.amax(-1, keepdim=True)  # so that a tiny temperature cannot overflow
    probs_SV = (shifted_SV / temperature_S[:, None]).nan_to_num_(nan=-torch.inf).softmax(-1)
    ids_SV: torch.Tensor | None = None
    if batch.top_k_S is not None or batch.top_p_S is not None or batch.min_p_S is not None:
        probs_SV, ids_SV = _filter(probs_SV, batch)
    cumulative_SV = probs_SV.double().cumsum(-1)
    threshold_S1 = torch.from_numpy(batch.uniform_S).to(device)[:, None] * cumulative_SV[:, -1:]
    # The first entry whose cumulative probability exceeds the threshold: never one of probability 0.
    place_S1 = torch.searchsorted(cumulative_SV, threshold_S1, right=True).clamp_(max=probs_SV.shape[1] - 1)
    return place_S1.squeeze(1) if ids_SV is None else ids_SV.gather(1, place_S1).squeeze(1)


def _filter(probs_SV: torch.Tensor, batch: SamplingBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroes what top_k, top_p and min_p leave out; returns falling probabilities and their token ids.

    Equal probabilities rank by token id. top_k keeps exactly k tokens; top_p keeps the smallest set whose share of
    what top_k left reaches p; min_p keeps tokens of at least min_p times the best one's probability.
    """
    device = probs_SV.device
    num_tokens = probs_SV.shape[1]
    sorted_SV, ids_SV = probs_SV.sort(dim=-1, descending=True, stable=True)
    if batch.top_k_S is not None:
        kept_S = np.where(batch.top_k_S == 0, num_tokens, np.minimum(batch.top_k_S, num_tokens))
        width = int(kept_S.max())
        sorted_SV, ids_SV = sorted_SV[:, :width].clone(), ids_SV[:, :width]
        rank_V = torch.arange(width, device=device)
        sorted_SV.masked_fill_(rank_V >= torch.from_numpy(kept_S).to(device)[:, None], 0.0)
    if batch.top_p_S is not None:
        top_p_S1 = torch.from_numpy(batch.top_p_S).to(device)[:, None]
        cumulative_SV = sorted_SV.double().cumsum(-1)
        before_SV = cumulative_SV - sorted_SV
        is_out_SV = (before_SV >= top_p_S1 * cumulative_SV[:, -1:]) & (top_p_S1 < 1)
        is_out_SV[:, 0] = False
        sorted_SV = sorted_SV.masked_fill(is_out_SV, 0.0)
    if batch.min_p_S is not None:
        floor_S1 = torch.from_numpy(batch.min_p_S).to(device)[:, None] * sorted_SV[:, :1]
        sorted_SV = sorted_SV.masked_fill(sorted_SV < floor_S1, 0.0)
    return sorted_SV, ids_SV


def _logprobs(logits_SV: torch.Tensor, tokens_S: torch.Tensor, batch: SamplingBatch) -> list[TokenLogprobs | None]:
    """Per row: the sampled token, then the best ones, as many as the row wants; None for rows that want none."""
    if batch.num_logprobs is None:
        return [None] * len(batch.logprobs_S)
    rows = [i for i, k in enumerate(batch.logprobs_S) if k is not None]
    index_R = torch.tensor(rows, device=logits_SV.device)
    logprobs_RV = logits_SV[index_R].log_softmax(-1)
    chosen_R1 = tokens_S[index_R, None]
    value_R1 = logprobs_RV.gather(1, chosen_R1)
    rank_R: list[int] = ((logprobs_RV > value_R1).sum(-1) + 1).tolist()
    top_values_RK, top_ids_RK = logprobs_RV.topk(min(batch.num_logprobs, logits_SV.shape[1]), dim=-1)
    ids: list[list[int]] = torch.cat((chosen_R1, top_ids_RK), dim=1).tolist()
    values: list[list[float]] = torch.cat((value_R1, top_values_RK), dim=1).tolist()
    found: list[TokenLogprobs | None] = [None] * len(batch.logprobs_S)
    for place, row_ids, row_values, rank in zip(rows, ids, values, rank_R, strict=True):
        wanted = batch.logprobs_S[place]
        assert wanted is not None
        found[place] = TokenLogprobs(
            token_ids=tuple(row_ids[: wanted + 1]), logprobs=tuple(row_values[: wanted + 1]), rank=rank
        )
    return found
