"""Draws one token per row of logits, all rows at once.

A draw needs one uniform number, which is a hash of the sequence's seed and the position of the token. So a request
with a seed gets the same tokens whatever shares its batch, before and after a preemption, and on every restart.

Shapes: S sequences, R rows of them, V vocabulary, W best tokens.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from fairlead.ops import reference
from fairlead.request import SamplingParams, TokenLogprobs
from fairlead.sampling.edits import LogitEdits, SamplingOps
from fairlead.sampling.logprobs import token_logprobs
from fairlead.scheduling.batch import SampleContext, SampledToken, ScheduledChunk

_FLOAT32 = np.finfo(np.float32)
NOTHING_LEFT = "no token is left to sample: the request's own masks forbid all of them"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnRows:
    """Rows of a step that are drawn in the same way, and what each needs for it. R is the number of these rows."""

    rows_R: np.ndarray
    temperature_R: np.ndarray  # float32, above 0
    top_k_R: np.ndarray  # float64, as are the rest; 0 is off
    top_p_R: np.ndarray
    min_p_R: np.ndarray
    uniform_R: np.ndarray

    @classmethod
    def of(cls, chunks: Seq[ScheduledChunk], rows: list[int]) -> "DrawnRows | None":
        """Collects the parameters of these rows; None if there are no rows."""
        if not rows:
            return None
        params = [chunks[i].params for i in rows]
        temperature_R = np.array([p.temperature for p in params]).clip(float(_FLOAT32.tiny), float(_FLOAT32.max))
        return cls(
            rows_R=np.array(rows),
            temperature_R=temperature_R.astype(np.float32),
            top_k_R=np.array([max(p.top_k, 0) for p in params], dtype=np.float64),
            top_p_R=np.array([p.top_p for p in params], dtype=np.float64),
            min_p_R=np.array([p.min_p for p in params], dtype=np.float64),
            uniform_R=uniform(
                np.array([chunks[i].sample_seed for i in rows], dtype=np.uint64),
                np.array([chunks[i].position for i in rows], dtype=np.uint64),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """The sampling parameters of a step's rows, on the host. Rows that are neither plain nor filtered are greedy."""

    beams: list[int]  # rows that are steps of a beam search
    edits: LogitEdits | None  # of the logits, before all else
    plain: DrawnRows | None  # drawn from the whole distribution
    filtered: DrawnRows | None  # cut by top_k, top_p or min_p first
    logprobs_S: tuple[int | None, ...]

    @classmethod
    def of(cls, chunks: Seq[ScheduledChunk], contexts: Mapping[int, SampleContext] | None = None) -> "SamplingBatch":
        """Collects the parameters of the chunks that sample, in order; `contexts` by their place, where needed."""
        drawn = [(i, _keeps_all(c.params)) for i, c in enumerate(chunks) if not c.params.is_greedy]
        return cls(
            beams=[i for i, c in enumerate(chunks) if c.extras is not None and c.extras.is_beam],
            edits=LogitEdits.of(contexts or {}, num_rows=len(chunks)),
            plain=DrawnRows.of(chunks, [i for i, keeps_all in drawn if keeps_all]),
            filtered=DrawnRows.of(chunks, [i for i, keeps_all in drawn if not keeps_all]),
            logprobs_S=tuple(c.params.logprobs if c.extras is None else c.extras.num_logprobs for c in chunks),
        )


def _keeps_all(params: SamplingParams) -> bool:
    return params.top_k <= 0 and params.top_p == 1 and params.min_p == 0


def uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each seed and position (uint64), in float64 of 53 random bits.

    Source: Steele et al., "Fast Splittable Pseudorandom Number Generators" (2014), figure 15, applied twice.
    """
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds) + positions * np.uint64(0x9E3779B97F4A7C15))
    fraction: np.ndarray = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fraction


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def sample(
    logits_SV: torch.Tensor,
    batch: SamplingBatch,
    allowed_SV: torch.Tensor | None = None,
    ops: SamplingOps = reference,
) -> tuple[list[SampledToken], torch.Tensor]:
    """Draws a token for every row; a row whose best logit is not finite (NaN anywhere, +inf, or all -inf) gets
    token_id None and leaves the others as they are. Returns the tokens on the device, too (S,) int64: any token in
    such a row.

    Greedy rows take the first of the largest logits. The others: temperature, then top_k, top_p and min_p, each on
    the distribution that the one before left, renormalised (the order of transformers), all of it on the edited logits.
    Log-probabilities are those of the unchanged ones. Of a beam, it is the log-probabilities that are edited, as
    transformers does, and these that are returned. `allowed_SV` are the logits with -inf where a grammar forbids a
    token; the edits start from them.
    """
    edited_SV = logits_SV if allowed_SV is None else allowed_SV
    if batch.beams:
        edited_SV = logits_SV.clone()
        edited_SV[batch.beams] = edited_SV[batch.beams].log_softmax(-1)
    errors: dict[int, str] = {}
    if batch.edits is not None:
        edited_SV, errors = batch.edits.apply(edited_SV, ops)
    best_S, tokens_S = edited_SV.max(dim=-1)
    # A row's own parameters alone decide how it is drawn: else its tokens would depend on what shares its batch.
    for drawn in (batch.plain, batch.filtered):
        if drawn is not None:
            rows_R = torch.from_numpy(drawn.rows_R).to(edited_SV.device)
            logits_RV = edited_SV if len(rows_R) == len(edited_SV) else edited_SV[rows_R]
            probs_RV = _probs(logits_RV, best_S[rows_R], drawn)
            if drawn is batch.plain:
                tokens_S[rows_R] = ops.draw(probs_RV, torch.from_numpy(drawn.uniform_R).to(probs_RV.device))
            else:
                top_k = int(drawn.top_k_R.max(where=drawn.top_k_R < probs_RV.shape[1], initial=0))
                tokens_S[rows_R] = ops.draw_filtered(probs_RV, _settings(drawn, probs_RV.device), top_k)
    is_bad_S = ~best_S.isfinite()
    if edited_SV is not logits_SV:
        is_nan_S = ~logits_SV.amax(dim=-1).isfinite()
        masked = zip((is_bad_S & ~is_nan_S).tolist(), is_nan_S.tolist(), strict=True)
        errors = {
            i: errors.get(i, NOTHING_LEFT) for i, (bad, nan) in enumerate(masked) if (bad or i in errors) and not nan
        }
        is_bad_S |= is_nan_S
    is_bad = is_bad_S.tolist()
    token_ids: list[int] = tokens_S.tolist()
    logprobs = _logprobs(logits_SV, edited_SV, tokens_S, batch)
    sampled = [
        SampledToken(token_id=None if bad else token_id, logprobs=None if bad else row)
        for token_id, bad, row in zip(token_ids, is_bad, logprobs, strict=True)
    ]
    for i, error in errors.items():
        sampled[i] = SampledToken(token_id=None, error=error)
    return sampled, tokens_S


def _probs(logits_RV: torch.Tensor, best_R: torch.Tensor, drawn: DrawnRows) -> torch.Tensor:
    temperature_R1 = torch.from_numpy(drawn.temperature_R).to(logits_RV.device)[:, None]
    shifted_RV = logits_RV - best_R[:, None]  # so that a tiny temperature cannot overflow
    return shifted_RV.div_(temperature_R1).softmax(-1)


def _settings(drawn: DrawnRows, device: torch.device) -> torch.Tensor:
    """What `draw_filtered` reads of each row, (4, R) in float64."""
    return torch.from_numpy(np.stack((drawn.top_k_R, drawn.top_p_R, drawn.min_p_R, drawn.uniform_R))).to(device)


def _logprobs(
    logits_SV: torch.Tensor, edited_SV: torch.Tensor, tokens_S: torch.Tensor, batch: SamplingBatch
) -> list[TokenLogprobs | None]:
    """Per row: the sampled token, then the best ones, as many as the row wants; None for rows that want none."""
    if all(k is None for k in batch.logprobs_S):
        return [None] * len(batch.logprobs_S)
    rows = [(i, k) for i, k in enumerate(batch.logprobs_S) if k is not None]
    index_R = torch.tensor([i for i, _ in rows], device=logits_SV.device)
    logprobs_RV = logits_SV[index_R].log_softmax(-1)
    if batch.beams:
        is_beam_R = torch.isin(index_R, torch.tensor(batch.beams, device=index_R.device))
        logprobs_RV[is_beam_R] = edited_SV[index_R[is_beam_R]]
    reported = token_logprobs(logprobs_RV, tokens_S[index_R], [k for _, k in rows])
    found: list[TokenLogprobs | None] = [None] * len(batch.logprobs_S)
    for (i, _), row in zip(rows, reported, strict=True):
        found[i] = row
    return found
