"""Sampling ops against their references: the very same tokens, ties included."""

from collections.abc import Callable

import pytest
import torch

from fairlead.ops import reference
from fairlead_triton.sampling import Sampling
from fairlead_triton.tuning import Tuning, read_table

OPS = Sampling(Tuning("sm_90"))
# Blocks far shorter than rows, so that small rows cross many of them.
TINY = "[logits.default]\nblock = 32\nnum_warps = 1\n[draw.default]\nblock = 64\nblock_filtered = 64\nnum_warps = 1"
SHORT = Sampling(Tuning("sm_90", read_table({"tiny.toml": TINY})))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_tokens", [1, 33, 350])
def test_penalties(num_tokens: int, device: torch.device) -> None:
    rng = generator(num_tokens)
    logits = torch.randn((3, num_tokens), generator=rng) * 5
    logits[0, 0], logits[1, 0], logits[2, -1] = torch.inf, -torch.inf, 3e38
    index = torch.randperm(3 * num_tokens, generator=rng)[: max(1, 2 * num_tokens)]
    index = torch.unique(torch.cat((index, torch.tensor([0, num_tokens, 3 * num_tokens - 1]))))
    settings = [torch.rand(len(index), generator=rng) * 2 + shift for shift in (0.25, -1.0, -1.0)]
    for ops in (OPS, SHORT):
        got, expected = logits.to(device), logits.clone()
        ops.apply_penalties(got, index.to(device), *(s.to(device) for s in settings))
        reference.apply_penalties(expected, index, *settings)
        torch.testing.assert_close(got.cpu(), expected, atol=1e-6, rtol=1e-6)
        untouched = torch.ones(3 * num_tokens, dtype=torch.bool).index_fill_(0, index, False)
        assert torch.equal(got.cpu().view(-1)[untouched], logits.view(-1)[untouched])


def test_no_penalties(device: torch.device) -> None:
    empty, logits = torch.empty(0, device=device), torch.ones((0, 5), device=device)
    OPS.apply_penalties(logits, empty.long(), empty, empty, empty)


@pytest.mark.parametrize(("num_rows", "num_tokens"), [(0, 40), (1, 1), (3, 31), (2, 33), (2, 1025)])
def test_bitmask(num_rows: int, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    rng = generator(num_tokens)
    logits = torch.randn((num_rows, num_tokens + 3), generator=rng).to(dtype)[:, 2:-1]
    words = torch.randint(-(2**31), 2**31, (num_rows, -(-num_tokens // 32) + 1), generator=rng).int()
    got = OPS.apply_token_bitmask(logits.to(device), words.to(device))
    assert torch.equal(got.cpu(), reference.apply_token_bitmask(logits, words))


def peaked(num_rows: int, num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    return torch.softmax(torch.randn((num_rows, num_tokens), generator=rng) * 4, -1)


def flat(num_rows: int, num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    return torch.full((num_rows, num_tokens), 1 / num_tokens)


def tied(num_rows: int, num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    """Few different values, zeros among them, all exact in binary."""
    values = torch.randint(0, 5, (num_rows, num_tokens), generator=rng).float() / 8
    values[:, 0] = 0.25
    return values


def one_hot(num_rows: int, num_tokens: int, rng: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(num_rows) % num_tokens, num_tokens).float()


MAKERS = [peaked, flat, tied, one_hot]
Maker = Callable[[int, int, torch.Generator], torch.Tensor]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("num_tokens", [1, 65])
def test_draw(num_tokens: int, make: Maker, device: torch.device, count: Callable[..., int]) -> None:
    rng = generator(num_tokens)
    probs = make(count(6, full=200), num_tokens, rng)
    uniform = torch.rand(len(probs), generator=rng, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1.0 - 2**-53
    expected = reference.draw(probs, uniform)
    for ops in (OPS, SHORT) if num_tokens == 65 else (SHORT,):
        assert ops.draw(probs.to(device), uniform.to(device)).tolist() == expected.tolist()


SETTINGS = [
    (0, 1, 0),
    (1, 1, 0),
    (7, 1, 0),
    (40, 0.5, 0),
    (0, 0.9, 0),
    (0, 0.0, 0),
    (0, 1e-9, 0),
    (0, 0.5, 0.25),
    (0, 1, 0.3),
    (0, 1, 1.0),
    (3, 0.75, 0.01),
    (10**6, 0.6, 0),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("num_tokens", [1, 70])
def test_draw_filtered(num_tokens: int, make: Maker, device: torch.device, count: Callable[..., int]) -> None:
    rng = generator(num_tokens)
    repeats = count(1, full=40)
    rows = SETTINGS * repeats
    probs = make(len(rows), num_tokens, rng)
    uniform = torch.rand(len(rows), generator=rng, dtype=torch.float64)
    uniform[::5] = 0.0
    settings = torch.cat((torch.tensor(rows, dtype=torch.float64).t(), uniform[None]))
    max_top_k = int(max(k for k, _, _ in rows if k < num_tokens))
    expected = reference.draw_filtered(probs, settings, max_top_k)
    for ops in (SHORT,):
        assert ops.draw_filtered(probs.to(device), settings.to(device), max_top_k).tolist() == expected.tolist()


def test_every_token_that_is_kept_can_be_drawn(device: torch.device) -> None:
    """Over a grid of uniform numbers, each token is drawn as often as its share of what is kept says."""
    probs = torch.tensor([0.25, 0.0625, 0.25, 0.0625, 0.25, 0.125])
    uniform = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    settings = torch.stack((torch.full((16,), 5.0), torch.ones(16), torch.zeros(16), uniform)).double()
    got = OPS.draw_filtered(probs.expand(16, -1).contiguous().to(device), settings.to(device), 5)
    expected = reference.draw_filtered(probs.expand(16, -1).contiguous(), settings, 5)
    assert got.tolist() == expected.tolist()
    assert set(got.tolist()) == {0, 1, 2, 4, 5}  # of the two equal worst ones, the first


def test_rows_that_are_views_and_rows_that_are_none(device: torch.device) -> None:
    probs = peaked(4, 101, generator(0))
    uniform = torch.rand(4, generator=generator(1), dtype=torch.float64)
    expected = reference.draw(probs[:, 1:].contiguous(), uniform)
    assert OPS.draw(probs.to(device)[:, 1:], uniform.to(device)).tolist() == expected.tolist()
    none = torch.empty((0, 101), device=device)
    assert OPS.draw(none, torch.empty(0, dtype=torch.float64, device=device)).shape == (0,)
    assert OPS.draw_filtered(none, torch.empty((4, 0), dtype=torch.float64, device=device), 0).shape == (0,)


def test_rows_that_are_not_numbers_end_with_some_token(device: torch.device) -> None:
    """A request whose logits were NaN fails elsewhere; here it must neither hang nor leave the vocabulary."""
    probs = torch.full((2, 70), torch.nan, device=device)
    settings = torch.tensor([[5.0, 0], [0.5, 0.9], [0.1, 0], [0.5, 0.5]], dtype=torch.float64, device=device)
    for tokens in (OPS.draw(probs, settings[3].contiguous()), OPS.draw_filtered(probs, settings, 5)):
        assert all(0 <= token < 70 for token in tokens.tolist())
