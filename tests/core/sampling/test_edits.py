"""What is done to logits before they are drawn from, against a NumPy oracle that goes token by token."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fairlead import plugins
from fairlead.errors import RequestError
from fairlead.request import Request, SamplingParams
from fairlead.sampling.edits import LogitEdits
from fairlead.sampling.sampler import NOTHING_LEFT, SamplingBatch, sample
from fairlead.scheduling.batch import ChunkExtras, SampleContext, SampledToken, ScheduledChunk

V = 50
EOS = 49
BEYOND = 70  # a token that the vocabulary does not have


@dataclass(frozen=True)
class Row:
    """A chunk that samples, and what precedes it if that changes its logits."""

    chunk: ScheduledChunk
    context: SampleContext | None


def chunk(
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    bad_words: tuple[tuple[int, ...], ...] = (),
    seed: int = 0,
    **params: Any,
) -> Row:
    if bad_words:
        params["bad_words"] = ["words"]
    request = Request(
        request_id="r",
        prompt_token_ids=prompt,
        params=SamplingParams(**params),
        eos_token_ids=(EOS, BEYOND),
        bad_words_token_ids=bad_words,
    )
    context = SampleContext(request=request, token_ids=prompt + output) if request.params.edits_logits else None
    made = ScheduledChunk(
        seq_id=0,
        token_ids=(1,),
        start=0,
        block_tables=((0, (0,)),),
        params=request.params,
        sample_seed=seed,
        position=len(prompt + output),
        extras=None if context is None else ChunkExtras(num_logprobs=params.get("logprobs")),
    )
    return Row(made, context)


def contexts(rows: list[Row]) -> dict[int, SampleContext]:
    return {i: row.context for i, row in enumerate(rows) if row.context is not None}


def oracle(logits_V: np.ndarray, made: Row) -> np.ndarray:
    """The edited row, in float32, written from the meaning of the parameters."""
    row = logits_V.astype(np.float32).copy()
    if made.context is None:
        return row
    params, request = made.chunk.params, made.context.request
    prompt, output = request.prompt_token_ids, made.context.token_ids[len(request.prompt_token_ids) :]
    for i in range(len(row)):
        if params.allowed_token_ids is not None and i not in params.allowed_token_ids:
            row[i] = -np.inf
        row[i] += np.float32((params.logit_bias or {}).get(i, 0.0))
    if len(output) < params.min_tokens:
        for i in (*params.stop_token_ids, *(() if params.ignore_eos else request.eos_token_ids)):
            if i < len(row):
                row[i] = -np.inf
    for word in request.bad_words_token_ids:
        if output[len(output) - len(word) + 1 :] == word[:-1] and len(word) <= len(output) + 1 and word[-1] < len(row):
            row[word[-1]] = -np.inf
    counts = Counter(output)
    for i in set(prompt) | set(output):
        penalty = np.float32(params.repetition_penalty)
        if np.isfinite(row[i]):
            row[i] = row[i] / penalty if row[i] > 0 else row[i] * penalty
            row[i] -= np.float32(params.frequency_penalty) * np.float32(counts[i])
            row[i] -= np.float32(params.presence_penalty) * np.float32(counts[i] > 0)
    return row


def edited(logits: np.ndarray, rows: list[Row]) -> np.ndarray:
    edits = LogitEdits.of(contexts(rows), len(rows))
    assert edits is not None
    found, errors = edits.apply(torch.from_numpy(logits).float())
    assert errors == {}
    return found.numpy()


EDITS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "negative presence": {"presence_penalty": -2.0},
    "frequency": {"frequency_penalty": 0.7},
    "negative frequency": {"frequency_penalty": -0.3},
    "repetition": {"repetition_penalty": 1.3},
    "repetition below 1": {"repetition_penalty": 0.8},
    "bias": {"logit_bias": {0: 5.0, 7: -100, 49: 100}},
    "allowed": {"allowed_token_ids": [3, 4, 5, 6, 30, 49]},
    "min_tokens": {"min_tokens": 3, "stop_token_ids": [5, BEYOND]},
    "min_tokens, ignore_eos": {"min_tokens": 3, "stop_token_ids": [6], "ignore_eos": True},
    "one-token bad words": {"bad_words": ((4,), (30,), (BEYOND,))},
    "bad words": {"bad_words": ((4, 5), (3, 4, 5), (6, 6, 6), (1, 2, 7))},
}


@pytest.mark.parametrize("first", EDITS)
def test_n14_edits_alone_and_two_by_two_are_the_oracles(first: str, count: Callable[..., int]) -> None:
    rng = np.random.default_rng(len(first))
    for second in EDITS:
        chunks = []
        for _ in range(count(4, full=100)):
            prompt = tuple(rng.integers(0, 8, size=rng.integers(1, 12)).tolist())
            output = tuple(rng.integers(0, 8, size=rng.integers(0, 12)).tolist())
            chunks.append(chunk(prompt, output, **{**EDITS[second], **EDITS[first]}))
        logits = rng.normal(0, 3, (len(chunks), V)).astype(np.float32)
        logits[rng.random(logits.shape) < 0.05] = -np.inf
        logits[rng.random(logits.shape) < 0.05] = 0.0
        found = edited(logits, chunks)
        for row, expected, one in zip(found, logits, chunks, strict=True):
            np.testing.assert_array_equal(row, oracle(expected, one))


def random_chunks(rng: np.random.Generator, num_rows: int) -> list[Row]:
    found = []
    for _ in range(num_rows):
        names = rng.choice(list(EDITS), size=rng.integers(0, 4), replace=False)
        settings: dict[str, Any] = {"temperature": float(rng.choice([0.0, 0.7, 1.0]))}
        for name in names:
            settings |= EDITS[name]
        if rng.random() < 0.3:
            settings |= {"top_k": 5, "logprobs": 2}
        prompt = tuple(rng.integers(0, 8, size=rng.integers(1, 12)).tolist())
        output = tuple(rng.integers(0, 8, size=rng.integers(0, 12)).tolist())
        found.append(chunk(prompt, output, seed=int(rng.integers(2**60)), **settings))
    return found


def draw(logits: torch.Tensor, rows: list[Row]) -> list[SampledToken]:
    return sample(logits, SamplingBatch.of([row.chunk for row in rows], contexts(rows)))[0]


def test_a_draw_does_not_depend_on_its_batch_and_changes_no_logits() -> None:
    rng = np.random.default_rng(3)
    chunks = random_chunks(rng, 60)
    logits = torch.from_numpy(rng.normal(0, 3, (60, V))).float()
    before = logits.clone()
    together = draw(logits, chunks)
    assert torch.equal(logits, before)
    assert together == [draw(logits[i : i + 1], [one])[0] for i, one in enumerate(chunks)]
    order = rng.permutation(60)[:31]
    assert [together[i] for i in order] == draw(logits[torch.from_numpy(order)], [chunks[i] for i in order])


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5, "frequency_penalty": 0.4, "presence_penalty": 0.3},
        {"logit_bias": {9: 2.0, 3: -1.0}, "presence_penalty": -1.0, "temperature": 0.8},
        {"allowed_token_ids": list(range(20)), "frequency_penalty": 0.5, "top_k": 12},
        {"bad_words": ((3,), (2, 9)), "min_tokens": 5, "top_p": 0.9, "repetition_penalty": 1.2},
        {"logit_bias": {4: -3.0}, "min_p": 0.05, "presence_penalty": 1.0},
    ],
    ids=str,
)
def test_n14_support_and_frequencies_are_the_oracles(settings: dict[str, Any], count: Callable[..., int]) -> None:
    """Edits come before temperature and the cuts."""
    num_draws = count(20_000, full=1_000_000)
    logits = np.round(np.random.default_rng(7).normal(0, 1.5, V) * 8) / 8
    made = {"prompt": (1, 2, 3, 3), "output": (4, 4, 9, 2), **settings}
    row = oracle(logits, chunk(**made)).astype(np.float64) / settings.get("temperature", 1.0)
    probs = np.exp(row - row.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if "top_k" in settings:
        probs[order[settings["top_k"] :]] = 0
    if "top_p" in settings:
        mass = probs[order].cumsum()
        probs[order[1:][mass[:-1] >= settings["top_p"]]] = 0
    probs[probs < settings.get("min_p", 0.0) * probs.max()] = 0
    probs /= probs.sum()
    found: Counter[int | None] = Counter()
    for start in range(0, num_draws, 4000):
        chunks = [chunk(seed=start + i, **made) for i in range(4000)]
        rows = torch.from_numpy(logits).float().expand(len(chunks), -1)
        found.update(token.token_id for token in draw(rows, chunks))
    assert set(found) <= set(np.flatnonzero(probs).tolist())
    expected = probs * num_draws
    common = expected >= 5
    observed = np.array([found[i] for i in range(V)])
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    # Wilson and Hilferty's approximation of the value that one in a thousand exceeds
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3


def test_repetition_penalty_and_bans_are_those_of_transformers() -> None:
    from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

    logits = np.random.default_rng(2).normal(0, 3, (1, V)).astype(np.float32)
    ids = torch.tensor([[5, 6, 7]])
    words = [[7, 8], [9], [6, 7, 11], [5, 12]]
    scores = NoBadWordsLogitsProcessor(words)(ids, torch.from_numpy(logits))
    scores = RepetitionPenaltyLogitsProcessor(1.4)(ids, scores)
    made = chunk((1,), (5, 6, 7), tuple(map(tuple, words)), repetition_penalty=1.4)
    found = edited(logits, [made])
    found[0, 1] = logits[0, 1]  # our prompt
    np.testing.assert_array_equal(found, scores.numpy())


@pytest.mark.parametrize("penalty", [1e-300, 1e-39, 1e39, 1e300])
def test_an_absurd_repetition_penalty_makes_no_nan_and_unmasks_nothing(penalty: float) -> None:
    logits = np.array([[3.0, -3.0, 0.0, -np.inf, 1.0]], dtype=np.float32)
    found = edited(logits, [chunk((0, 1, 2, 3), repetition_penalty=penalty, frequency_penalty=2)])
    assert found[0, 3:].tolist() == [-np.inf, 1.0]
    assert np.isfinite(found[0, :3]).all()
    assert (found[0, 0] < 3) == (penalty > 1)


def test_a_batch_without_edits_has_none() -> None:
    rows = [chunk(), chunk(temperature=0, logprobs=3, stop_token_ids=[4])]
    assert LogitEdits.of(contexts(rows), len(rows)) is None


def test_logprobs_are_those_of_the_unedited_logits() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0]])
    (token,) = draw(logits, [chunk((0,), temperature=0, allowed_token_ids=[1], logprobs=1, logit_bias={1: 50})])
    assert token.token_id == 1
    assert token.logprobs is not None
    assert (token.logprobs.token_ids, token.logprobs.rank) == ((1, 0), 2)
    assert token.logprobs.logprobs[0] == pytest.approx(logits[0].log_softmax(-1)[1].item())


def test_a_row_that_is_left_no_token_fails_alone_and_is_told_from_nan() -> None:
    logits = torch.zeros(4, V)
    logits[2, 0] = torch.nan
    masked = chunk(allowed_token_ids=[EOS], min_tokens=2)
    found = draw(logits, [masked, chunk(temperature=0), chunk(allowed_token_ids=[4]), chunk(allowed_token_ids=[4])])
    assert found[0] == SampledToken(token_id=None, error=NOTHING_LEFT)
    assert [token.token_id for token in found[1:]] == [0, None, 4]
    assert found[2].error is None  # the model's fault, not the request's


def only_even(logits_V: torch.Tensor, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
    assert (prompt, output) == ((1, 2), (3,))
    logits_V[1::2] = -torch.inf
    return logits_V


def add_ten_to_six(logits_V: torch.Tensor, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
    return logits_V + 10 * (torch.arange(len(logits_V)) == 6)


def test_processors_come_first_and_in_order() -> None:
    logits = torch.from_numpy(np.random.default_rng(4).normal(0, 1, (2, V))).float()
    made = chunk((1, 2), (3,), temperature=0, logits_processors=[only_even, add_ten_to_six])
    assert [t.token_id for t in draw(logits, [made, chunk(temperature=0)])] == [6, int(logits[1].argmax())]
    made = chunk((1, 2), (3,), temperature=0, logits_processors=[only_even], logit_bias={7: 100, 8: 50})
    assert draw(logits[:1], [made])[0].token_id == 8


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda logits_V, prompt, output: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda logits_V, prompt, output: logits_V[1:], r"must return the logits, of equal shape, but gave .*49"),
        (lambda logits_V, prompt, output: None, "must return the logits, of equal shape, but gave"),
        (lambda logits_V: logits_V, "raised TypeError"),
    ],
    ids=["raises", "shape", "nothing", "arguments"],
)
def test_a_faulty_processor_ends_its_own_request(processor: Callable[..., Any], message: str) -> None:
    found = draw(torch.zeros(2, V), [chunk(logits_processors=[processor]), chunk(temperature=0)])
    assert found[0].token_id is None
    assert found[0].error is not None
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(found[0].error)
    assert found[1].token_id == 0


class EntryPoint:
    """What importlib.metadata gives for an installed one."""

    def __init__(self, name: str, loaded: object) -> None:
        self.name, self._loaded = name, loaded

    def load(self) -> object:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def test_processors_by_name_are_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [
        EntryPoint("six", add_ten_to_six),
        EntryPoint("broken", ImportError("no such thing")),
        EntryPoint("number", 7),
    ]
    monkeypatch.setattr(plugins.importlib.metadata, "entry_points", lambda group: installed)
    monkeypatch.setattr(plugins, "_processors", {})
    assert plugins.load_logits_processor("six") is add_ten_to_six
    assert draw(torch.zeros(1, V), [chunk(temperature=0, logits_processors=["six"])])[0].token_id == 6
    for name, message in (
        ("os.system", "no logits processor 'os.system'; found: broken, number, six"),
        ("broken", "cannot be loaded: ImportError: no such thing"),
        ("number", "is no callable but a int"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            plugins.load_logits_processor(name)
        assert caught.value.param == "logits_processors"
    monkeypatch.setattr(plugins, "_processors", {})
    monkeypatch.setenv(plugins.ALLOWLIST_VARIABLE, "cpu")
    with pytest.raises(RequestError, match="permits only: cpu"):
        plugins.load_logits_processor("six")
