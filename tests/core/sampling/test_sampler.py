"""The sampler against a NumPy oracle, written from the meaning of the parameters."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fairlead.ops.reference import NUM_CANDIDATES
from fairlead.request import SamplingParams
from fairlead.sampling.sampler import DrawnRows, SamplingBatch, sample, uniform
from fairlead.scheduling.batch import SampledToken, ScheduledChunk

MAX_SEED = 2**64 - 1
LAST_UNIFORM = 1 - 2.0**-53


def chunk(seed: int = 0, position: int = 0, **params: Any) -> ScheduledChunk:
    return ScheduledChunk(
        seq_id=0,
        token_ids=(1,),
        start=0,
        block_tables=((0, (0,)),),
        params=SamplingParams(**params),
        sample_seed=seed,
        position=position,
    )


def draw(logits: torch.Tensor, chunks: list[ScheduledChunk]) -> list[SampledToken]:
    return sample(logits, SamplingBatch.of(chunks))[0]


def draw_at(logits_V: np.ndarray, uniforms: np.ndarray, **params: Any) -> list[int | None]:
    """One row's tokens for chosen uniform numbers."""
    rows = torch.from_numpy(logits_V).float().expand(len(uniforms), -1)
    batch = SamplingBatch.of([chunk(**params)] * len(uniforms))

    def chosen(drawn: DrawnRows | None) -> DrawnRows | None:
        return None if drawn is None else dataclasses.replace(drawn, uniform_R=uniforms)

    batch = dataclasses.replace(batch, plain=chosen(batch.plain), filtered=chosen(batch.filtered))
    return [token.token_id for token in sample(rows, batch)[0]]


def oracle(
    logits_V: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[list[int], np.ndarray, float]:
    """The kept tokens, best first (ties by id), their probabilities, and how close a cut was to going otherwise."""
    scaled = logits_V.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted((i for i in range(len(weights)) if weights[i] > 0), key=lambda i: (-scaled[i], i))
    if top_k > 0:
        order = order[:top_k]
    total = sum(weights[i] for i in order)
    margin, mass, kept = math.inf, 0.0, []
    for i in order:
        if top_p < 1 and kept:
            margin = min(margin, abs(mass - top_p))
            if mass >= top_p:
                break
        kept.append(i)
        mass += weights[i] / total
    if min_p > 0:
        margin = min([margin] + [abs(weights[i] - min_p) for i in kept[1:]])
        kept = [i for i in kept if weights[i] >= min_p]
    probs = weights[kept] / weights[kept].sum()
    return kept, probs, margin


def check_against_oracle(logits_V: np.ndarray, **params: Any) -> bool:
    """Every kept token is drawn in the middle of its own interval, and nothing else is; False if a cut is too close.

    Intervals of less than 1e-5 are left out: float32 probabilities shift them by more than their width.
    """
    kept, probs, margin = oracle(logits_V, **params)
    if margin < 1e-5:
        return False
    is_plain = params.get("top_k", 0) <= 0 and params.get("top_p", 1) == 1 and params.get("min_p", 0) == 0
    order = np.argsort(kept) if is_plain else np.arange(len(kept))
    tokens, probs = [kept[i] for i in order], probs[order]
    wide = np.flatnonzero(probs > 1e-5)
    assert draw_at(logits_V, (probs.cumsum() - probs / 2)[wide], **params) == [tokens[i] for i in wide]
    first, last = draw_at(logits_V, np.array([0.0, LAST_UNIFORM]), **params)
    assert first in tokens[: wide[0] + 1]
    assert last in tokens[wide[-1] :]
    return True


def random_logits(rng: np.random.Generator, size: int) -> np.ndarray:
    """Multiples of 1/8: many exact ties, and no near ones that rounding could turn."""
    logits = np.round(rng.normal(0, rng.choice([0.3, 2, 5]), size) * 8) / 8
    if rng.random() < 0.3:
        logits[rng.random(size) < 0.3] = -np.inf
        logits[rng.integers(size)] = 1.0
    return logits


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.25},
        {"temperature": 3.0},
        {"temperature": 1e30},
        {"temperature": 1e39},  # beyond float32
        {"top_k": -1},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 10_000},
        {"top_k": 2**31 - 1},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"top_p": 1e-9},
        {"top_p": 1 - 1e-3},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 20, "min_p": 0.02},
        {"top_p": 0.9, "min_p": 0.2},
        {"temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_n14_support_and_shares_are_the_oracles(settings: dict[str, Any], count: Callable[..., int]) -> None:
    rng = np.random.default_rng(0)
    checked = sum(
        check_against_oracle(random_logits(rng, size), **settings)
        for _ in range(count(3, full=300))
        for size in (1, 2, 13, 100)
    )
    assert checked >= count(6, full=600)


@pytest.mark.parametrize("settings", [{"top_p": 0.97}, {"min_p": 0.01}, {"top_k": NUM_CANDIDATES + 1}], ids=str)
def test_more_tokens_than_the_sorted_candidates(settings: dict[str, Any]) -> None:
    logits = np.round(np.random.default_rng(1).normal(0, 1, 3 * NUM_CANDIDATES) * 8) / 8
    assert len(oracle(logits, **settings)[0]) > NUM_CANDIDATES
    assert check_against_oracle(logits, **settings)
    rows = torch.from_numpy(np.stack([logits, logits * 64])).float()  # the second needs few candidates
    chunks = [chunk(seed=3, **settings), chunk(seed=4, **settings)]
    both = [t.token_id for t in draw(rows, chunks)]
    assert both == [draw(rows[i : i + 1], chunks[i : i + 1])[0].token_id for i in range(2)]


def test_order_is_temperature_then_top_k_then_top_p_then_min_p() -> None:
    probs = np.array([0.4, 0.3, 0.2, 0.1])
    logits = np.log(probs)
    # top_k=2 leaves 4/7 and 3/7: top_p=0.55 is reached by the first alone, though 0.4 of the whole would not reach it.
    assert oracle(logits, top_k=2, top_p=0.55)[0] == [0]
    assert set(draw_at(logits, np.linspace(0, LAST_UNIFORM, 50), top_k=2, top_p=0.55)) == {0}
    # min_p would leave 0.4, 0.3, 0.2; of those, top_p=0.75 would keep two. But top_p comes first and keeps three.
    assert oracle(logits, top_p=0.75, min_p=0.5)[0] == [0, 1, 2]
    assert set(draw_at(logits, np.linspace(0, LAST_UNIFORM, 50), top_p=0.75, min_p=0.5)) == {0, 1, 2}


def test_order_is_that_of_transformers() -> None:
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(5)
    for _ in range(20):
        logits = rng.permutation(40) / rng.choice([3.0, 8.0])  # no ties: there transformers keeps more than k
        top_k, top_p, min_p = int(rng.integers(2, 30)), float(rng.uniform(0.3, 0.99)), float(rng.uniform(0.01, 0.5))
        settings = {"temperature": 0.8, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        if oracle(logits, **settings)[2] < 1e-5:
            continue
        scores = torch.from_numpy(logits)[None].float()
        ids = torch.zeros((1, 1), dtype=torch.long)
        for warper in (
            TemperatureLogitsWarper(0.8),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ):
            scores = warper(ids, scores)
        assert set(oracle(logits, **settings)[0]) == set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
        assert check_against_oracle(logits, **settings)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-38, 1e-45, 1e-300])
def test_cold_rows_take_the_best(temperature: float) -> None:
    logits = torch.tensor([[0.0, 80.0, -80.0, 79.9], [-torch.inf, -3.0, -torch.inf, -3.1]])
    for seed in (0, 1, MAX_SEED):
        assert [t.token_id for t in draw(logits, [chunk(seed, temperature=temperature)] * 2)] == [1, 1]


def test_greedy_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 9.0]])
    assert [t.token_id for t in draw(logits, [chunk(temperature=0)] * 3)] == [1, 0, 3]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 10},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 25, "top_p": 0.9, "min_p": 0.03},
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_n14_frequencies_are_the_oracles(settings: dict[str, Any], vary: str, count: Callable[..., int]) -> None:
    num_draws = count(20_000, full=1_000_000)
    logits = random_logits(np.random.default_rng(7), 40)
    kept, probs, _ = oracle(logits, **settings)
    found: Counter[int | None] = Counter()
    for start in range(0, num_draws, 20_000):
        chunks = [chunk(**{vary: start + i}, **settings) for i in range(20_000)]
        rows = torch.from_numpy(logits).float().expand(len(chunks), -1)
        found.update(t.token_id for t in draw(rows, chunks))
    assert set(found) <= set(kept)
    expected = probs * num_draws
    common = expected >= 5
    observed = np.array([found[i] for i in kept])
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    # Wilson and Hilferty's approximation of the value that one in a thousand exceeds
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def mixed_chunks(rng: np.random.Generator, num_rows: int) -> list[ScheduledChunk]:
    choices: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3, "top_p": 0.5},
        {"temperature": 0.8},
        {"temperature": 1.0, "logprobs": 0},
        {"top_k": 5},
        {"top_k": 60, "top_p": 0.9},
        {"top_p": 0.7, "logprobs": 2},
        {"min_p": 0.1, "temperature": 1.5},
    ]
    return [
        chunk(int(rng.integers(0, MAX_SEED, dtype=np.uint64)), int(rng.integers(10_000)), **choices[rng.integers(8)])
        for _ in range(num_rows)
    ]


def test_a_draw_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(11)
    logits = torch.from_numpy(rng.normal(0, 3, (48, 700))).float()
    chunks = mixed_chunks(rng, 48)
    together = draw(logits, chunks)
    assert together == [draw(logits[i : i + 1], [c])[0] for i, c in enumerate(chunks)]
    order = rng.permutation(48)[:31]
    assert [together[i] for i in order] == draw(logits[torch.from_numpy(order)], [chunks[i] for i in order])


@pytest.mark.parametrize(
    "fault",
    [
        lambda row: row.fill_(torch.nan),
        lambda row: row[17:18].fill_(torch.nan),
        lambda row: row[17:18].fill_(torch.inf),
        lambda row: row[:2].fill_(torch.inf),
        lambda row: row.fill_(-torch.inf),
        lambda row: row.fill_(torch.inf),
    ],
    ids=["all nan", "one nan", "one inf", "two inf", "all -inf", "all inf"],
)
def test_a_row_without_a_finite_best_fails_alone(fault: Callable[[torch.Tensor], object]) -> None:
    rng = np.random.default_rng(13)
    logits = torch.from_numpy(rng.normal(0, 3, (24, 700))).float()
    chunks = mixed_chunks(rng, 24)
    healthy = draw(logits, chunks)
    bad = list(range(0, 24, 3))
    for i in bad:
        fault(logits[i])
    found = draw(logits, chunks)
    assert all(found[i] == SampledToken(token_id=None, logprobs=None) for i in bad)
    assert all(found[i] == healthy[i] for i in range(24) if i not in bad)
    for i in bad:
        assert draw(logits[i : i + 1], [chunks[i]])[0].token_id is None


def test_masked_tokens_are_no_fault() -> None:
    logits = torch.full((3, 50), -torch.inf)
    logits[:, 7] = -1e30
    chunks = [chunk(temperature=0, logprobs=2), chunk(temperature=5.0), chunk(top_p=0.5)]
    found = draw(logits, chunks)
    assert [t.token_id for t in found] == [7, 7, 7]
    assert found[0].logprobs is not None
    assert found[0].logprobs.logprobs == (0.0, 0.0, -math.inf)


def test_the_logits_are_not_changed() -> None:
    rng = np.random.default_rng(17)
    logits = torch.from_numpy(rng.normal(0, 3, (16, 700))).float()
    before = logits.clone()
    draw(logits, mixed_chunks(rng, 16))
    draw(logits, [chunk()] * 16)
    draw(logits, [chunk(top_k=3)] * 16)
    assert torch.equal(logits, before)


def test_logprobs_are_those_of_the_unchanged_logits() -> None:
    rng = np.random.default_rng(19)
    logits = rng.permutation(200).reshape(4, 50) / 10.0
    wanted = [None, 0, 3, 20]
    chunks = [chunk(seed=i, temperature=1.7, top_k=9, logprobs=k) for i, k in enumerate(wanted)]
    found = draw(torch.from_numpy(logits).float(), chunks)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert found[0].logprobs is None
    for i in (1, 2, 3):
        row, token, logprobs = expected[i], found[i].token_id, found[i].logprobs
        assert logprobs is not None
        assert token is not None
        best = np.argsort(-row)[: wanted[i]].tolist()
        assert logprobs.token_ids == (token, *best)
        np.testing.assert_allclose(logprobs.logprobs, row[[token, *best]], atol=1e-5)
        assert logprobs.rank == 1 + (row > row[token]).sum()


def test_more_logprobs_than_tokens() -> None:
    found = draw(torch.tensor([[0.0, 1.0, 2.0]]), [chunk(temperature=0, logprobs=20)])[0].logprobs
    assert found is not None
    assert found.token_ids == (2, 2, 1, 0)
    assert found.rank == 1


def test_uniform_numbers_fill_the_unit_interval() -> None:
    seeds, positions = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64), indexing="ij")
    values = uniform(seeds.ravel(), positions.ravel()).reshape(300, 300)
    assert values.min() >= 0
    assert values.max() < 1
    assert len(np.unique(values)) == values.size
    # Five standard errors of 90,000 independent numbers
    assert abs(values.mean() - 0.5) < 5 * math.sqrt(1 / 12 / values.size)
    assert abs(values.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / values.size)
    centred = values - 0.5
    for lag in (1, 2, 7, 64):
        for a, b in ((centred[:, lag:], centred[:, :-lag]), (centred[lag:], centred[:-lag])):
            assert abs((a * b).mean()) < 5 / 12 / math.sqrt(a.size)
    assert abs((centred * centred.T).mean()) < 5 / 12 / math.sqrt(values.size / 2) + 1 / 12 / 300


def test_uniform_numbers_at_the_ends_of_their_arguments() -> None:
    ends = np.array([0, 1, 2**32, 2**63, MAX_SEED], dtype=np.uint64)
    values = uniform(np.repeat(ends, 5), np.tile(ends, 5))
    assert ((values >= 0) & (values < 1)).all()
    assert len(np.unique(values)) == 25
