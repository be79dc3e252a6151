"""Gates, rotation, gathers and copies against their references."""

import pytest
import torch

from fairlead.ops import reference
from fairlead.ops.table import TOLERANCE
from fairlead_triton.elementwise import Elementwise
from fairlead_triton.tuning import Tuning

OPS = Elementwise(Tuning("sm_90"))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    bound = TOLERANCE[str(dtype).removeprefix("torch.")]
    assert got.dtype == dtype
    assert got.shape == expected.shape
    torch.testing.assert_close(got.float(), expected.float(), atol=bound, rtol=bound)


@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 2 * 1023), (2, 2 * 1025), (2, 3, 50)])
@pytest.mark.parametrize("op", ["silu_and_mul", "gelu_and_mul"])
def test_gates(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x = (random(*shape) * 4).to(dtype).to(device)
    close(getattr(OPS, op)(x), getattr(reference, op)(x.float()), dtype)
    if shape[0] > 2:
        close(getattr(OPS, op)(x[::2, 10:20]), getattr(reference, op)(x[::2, 10:20].float()), dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_size"),
    [(0, 4, 2, 8), (1, 1, 1, 2), (5, 7, 3, 80), (2, 40, 8, 64)],
)
def test_rotary(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    interleaved: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Queries and keys are cut out of one projection, as models do."""
    columns = (num_heads + 2 * num_kv_heads) * head_size
    qkv = random(num_tokens, columns, dtype=dtype).to(device)
    q, k, _ = qkv.split([num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size], dim=-1)
    q, k = q.view(num_tokens, num_heads, head_size), k.view(num_tokens, num_kv_heads, head_size)
    positions = torch.randint(0, 50, (num_tokens,), generator=torch.Generator().manual_seed(1)).to(device)
    angles = random(50, head_size // 2, seed=2)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    cos, sin = angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)
    expected = reference.rotary_embedding(q.float(), k.float(), positions, cos.float(), sin.float(), interleaved)
    for got, wanted in zip(OPS.rotary_embedding(q, k, positions, cos, sin, interleaved), expected, strict=True):
        close(got, wanted, dtype)


@pytest.mark.parametrize(("num_tokens", "width"), [(0, 8), (1, 1), (3, 1023), (2, 1025)])
def test_embedding(num_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = random(37, width, dtype=dtype).to(device)
    token_ids = torch.randint(0, 37, (num_tokens,), generator=torch.Generator().manual_seed(1)).to(device)
    for table in (weight, weight[:, ::1], weight.t().contiguous().t()):
        assert torch.equal(OPS.embedding(token_ids, table), reference.embedding(token_ids, table))


@pytest.mark.parametrize("block_size", [16, 32])
def test_copy_blocks(block_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """All layers at once, within a cache and into another one of another number of blocks."""
    caches = [random(6, block_size, 3, 40, seed=i, dtype=dtype).to(device) for i in range(3)]
    expected = [cache.clone() for cache in caches]
    pairs = torch.tensor([[0, 3], [5, 1]], device=device)
    for cache in expected:
        cache[[3, 1]] = cache[[0, 5]]
    OPS.copy_blocks(caches, caches, pairs)
    assert all(torch.equal(cache, wanted) for cache, wanted in zip(caches, expected, strict=True))
    others = [torch.zeros((2, block_size, 3, 40), dtype=dtype, device=device) for _ in range(3)]
    OPS.copy_blocks(caches, others, torch.tensor([[4, 1]], device=device))
    assert all(torch.equal(other[1], cache[4]) for other, cache in zip(others, caches, strict=True))
    assert not any(other[0].any() for other in others)


def test_copy_of_blocks_within_a_larger_row_and_of_none(device: torch.device) -> None:
    """Layers that share one tensor, their blocks one after the other."""
    shared = random(4, 2, 16, 8).to(device)
    layers = [shared[:, 0], shared[:, 1]]
    OPS.copy_blocks(layers, layers, torch.empty((0, 2), dtype=torch.int64, device=device))
    expected = shared.clone()
    expected[2] = expected[0]
    OPS.copy_blocks(layers, layers, torch.tensor([[0, 2]], device=device))
    assert torch.equal(shared, expected)


def test_caches_that_differ_are_refused(device: torch.device) -> None:
    pairs = torch.tensor([[0, 1]], device=device)
    with pytest.raises(AssertionError, match="of one shape"):
        OPS.copy_blocks([torch.zeros(2, 4, device=device)], [torch.zeros(2, 8, device=device)], pairs)
