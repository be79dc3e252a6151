"""The native draws, masks, penalties and adapters, by every instruction set that this machine can run."""

from collections.abc import Callable, Iterator

import pytest
import torch

from fairlead.ops import reference
from fairlead.ops.table import TOLERANCE
from fairlead_cpu import native, topology
from fairlead_cpu.native_lora import NativeLora
from fairlead_cpu.native_sampling import NativeSampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# top_k, top_p, min_p, uniform: each alone, all together, off, and beyond the vocabulary
SETTINGS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (600, 1.0, 0.0),
    (10**6, 0.7, 0.0),
    (0, 0.05, 0.0),
    (0, 0.9, 0.0),
    (0, 0.9999, 0.0),
    (0, 1.0, 0.2),
    (0, 1.0, 1e-7),
    (0, 1.0, 1.0),
    (50, 0.8, 0.01),
    (900, 0.999, 1e-5),
]
pytestmark = pytest.mark.skipif(not native.usable(), reason="fairlead-cpu was built without kernels")


@pytest.fixture(scope="module", params=native.usable())
def kernels(request: pytest.FixtureRequest) -> Iterator[native.Kernels]:
    """The library of one instruction set, with three threads whatever the machine has."""
    kernels = native.Kernels(request.param, topology.Layout(cpus=(-1, -1, -1), bound=False, reason="test"))
    yield kernels
    kernels.call.fl_pool_shutdown()


def make_probs(num_rows: int, num_tokens: int, scale: float, seed: int = 0) -> torch.Tensor:
    """Rows of a softmax; the scale says how peaked. Rounded, so that equal probabilities are many."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_tokens, generator=generator) * scale
    return logits.mul_(8).round_().div_(8).softmax(-1)


def make_settings(num_rows: int, seed: int) -> tuple[torch.Tensor, int]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(SETTINGS, dtype=torch.float64)[
        torch.randint(0, len(SETTINGS), (num_rows,), generator=generator)
    ]
    uniform = torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    top_k = chosen[:, 0][chosen[:, 0] < 10**6].max() if num_rows else torch.zeros(())
    return torch.cat((chosen, uniform), dim=1).t().contiguous(), int(top_k)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 255, 256, 257, 1000, 32003])
def test_the_drawn_tokens_are_those_of_the_reference(kernels: native.Kernels, num_tokens: int) -> None:
    ops = NativeSampling(kernels)
    for seed, scale in enumerate((0.0, 0.5, 3.0, 12.0)):
        probs = make_probs(40, num_tokens, scale, seed)
        uniform = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
        before = probs.clone()
        found = ops.draw(probs, uniform)
        assert bool((probs.gather(1, found[:, None]) > 0).all())
        assert torch.equal(found[2:], reference.draw(probs, uniform)[2:])
        assert torch.equal(probs, before)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 255, 257, 1000, 32003])
def test_the_filtered_tokens_are_those_of_the_reference(kernels: native.Kernels, num_tokens: int) -> None:
    ops = NativeSampling(kernels)
    for seed, scale in enumerate((0.0, 0.5, 3.0, 12.0)):
        probs = make_probs(40, num_tokens, scale, seed)
        settings, _ = make_settings(40, seed)
        is_on = (settings[0] > 0) & (settings[0] < num_tokens)
        max_top_k = int(settings[0][is_on].max()) if bool(is_on.any()) else 0
        found = ops.draw_filtered(probs, settings, max_top_k)
        expected = reference.draw_filtered(probs, settings, max_top_k)
        assert torch.equal(found, expected), (scale, settings[:, found != expected])


def test_a_row_draws_the_same_token_alone_and_in_any_batch(kernels: native.Kernels) -> None:
    ops = NativeSampling(kernels)
    probs = torch.cat((torch.zeros(64, 3), make_probs(64, 5001, 2.0)), dim=1)[:, 3:]  # rows at a stride
    settings, top_k = make_settings(64, 1)
    uniform = settings[3].contiguous()
    drawn, filtered = ops.draw(probs, uniform), ops.draw_filtered(probs, settings, top_k)
    for row in (0, 1, 31, 63):
        one = slice(row, row + 1)
        assert ops.draw(probs[one], uniform[one])[0] == drawn[row]
        assert ops.draw_filtered(probs[one], settings[:, one], top_k)[0] == filtered[row]


def test_rows_that_are_no_numbers_end_with_some_token_and_leave_the_others(kernels: native.Kernels) -> None:
    ops = NativeSampling(kernels)
    probs = make_probs(5, 700, 2.0)
    settings, top_k = make_settings(5, 2)
    uniform = settings[3].contiguous()
    sound = ops.draw(probs, uniform), ops.draw_filtered(probs, settings, top_k)
    probs[2], probs[4, 5] = torch.nan, torch.nan
    for expected, found in zip(
        sound, (ops.draw(probs, uniform), ops.draw_filtered(probs, settings, top_k)), strict=True
    ):
        assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])
        assert bool(((found >= 0) & (found < 700)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_is_that_of_the_reference(kernels: native.Kernels, dtype: str) -> None:
    ops = NativeSampling(kernels)
    for num_rows, num_tokens in ((0, 5), (1, 1), (3, 31), (2, 32), (5, 33), (40, 2001)):
        generator = torch.Generator().manual_seed(num_tokens)
        logits = torch.randn(num_rows, num_tokens + 2, generator=generator).to(DTYPES[dtype])[:, 1:-1]
        words = torch.randint(-(2**31), 2**31, (num_rows, -(-num_tokens // 32) + 1), generator=generator).int()
        assert torch.equal(ops.apply_token_bitmask(logits, words), reference.apply_token_bitmask(logits, words))


def test_the_penalties_are_those_of_the_reference(kernels: native.Kernels) -> None:
    ops = NativeSampling(kernels)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 301, generator=generator) * 5
    logits[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])
    index = torch.cat((torch.arange(4), 4 + torch.randperm(7 * 301 - 4, generator=generator)[:900]))
    penalties = [torch.rand(904, generator=generator) + low for low in (0.05, 0.0, -0.5)]
    penalties[1][3] = -3e38  # a finite logit stays finite
    expected = logits.clone()
    reference.apply_penalties(expected, index, *penalties)
    ops.apply_penalties(logits, index, *penalties)
    assert torch.equal(logits.nan_to_num(nan=7e9, posinf=torch.inf), expected.nan_to_num(nan=7e9, posinf=torch.inf))
    ops.apply_penalties(logits, index[:0], *(p[:0] for p in penalties))


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_those_of_the_reference(kernels: native.Kernels, dtype: str) -> None:
    ops, kind = NativeLora(kernels), DTYPES[dtype]
    for num_rows, size, rank in ((0, 8, 4), (1, 1, 1), (3, 65, 5), (9, 130, 8), (33, 576, 16), (64, 100, 64)):
        generator = torch.Generator().manual_seed(size)

        def random(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).div_(shape[-1] ** 0.5).to(kind)

        x, a, b, y = random(num_rows, 3 * size)[:, size : 2 * size], random(4, rank, size), random(4, size, rank), None
        a[0] = b[0] = 0
        y = random(num_rows, size)
        adapters = torch.arange(num_rows) * 7 % 4
        h = ops.lora_shrink(x, a, adapters)
        torch.testing.assert_close(h, reference.lora_shrink(x, a, adapters), atol=1e-5, rtol=1e-5)
        found = ops.lora_expand(y, h, b, adapters)
        expected = reference.lora_expand(y.float(), h, b.float(), adapters)
        assert found.dtype == kind
        torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert torch.equal(found[adapters == 0], y[adapters == 0])
        for row in range(0, num_rows, 13):
            one = slice(row, row + 1)
            alone = ops.lora_shrink(x[one], a, adapters[one])
            assert torch.equal(alone[0], h[row])
            assert torch.equal(ops.lora_expand(y[one], alone, b, adapters[one])[0], found[row])


def test_random_settings(kernels: native.Kernels, count: Callable[..., int]) -> None:
    """Vocabularies, peaks and settings at random."""
    ops, generator = NativeSampling(kernels), torch.Generator().manual_seed(3)
    for seed in range(count(5, full=400)):
        num_tokens = int(torch.randint(1, 4000, (), generator=generator))
        probs = make_probs(16, num_tokens, float(torch.rand((), generator=generator) * 10), seed)
        settings, _ = make_settings(16, seed)
        is_on = (settings[0] > 0) & (settings[0] < num_tokens)
        max_top_k = int(settings[0][is_on].max()) if bool(is_on.any()) else 0
        found = ops.draw_filtered(probs, settings, max_top_k)
        assert torch.equal(found, reference.draw_filtered(probs, settings, max_top_k)), (num_tokens, seed)
