"""Adapters against their references: mixed rows, and rows of none bit by bit."""

import pytest
import torch

from fairlead.ops import reference
from fairlead.ops.table import TOLERANCE
from fairlead_triton.lora import Lora
from fairlead_triton.tuning import Tuning

OPS = Lora(Tuning("sm_90"))


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("num_rows", "rank"), [(0, 8), (1, 1), (17, 65)])
def test_adapters(num_rows: int, rank: int, dtype: torch.dtype, device: torch.device) -> None:
    bound = TOLERANCE[str(dtype).removeprefix("torch.")]
    adapters = torch.randint(0, 4, (num_rows,), generator=torch.Generator().manual_seed(num_rows)).to(device)
    x = random(num_rows, 131 + 2, seed=0).to(dtype).to(device)[:, 1:-1]
    a = random(4, rank, 131, seed=1, scale=0.1).to(dtype).to(device)
    b = random(4, 140, rank, seed=2, scale=0.1).to(dtype).to(device)
    a[0], b[0] = 0, 0
    y = random(num_rows, 140, seed=3).to(dtype).to(device)
    h = OPS.lora_shrink(x, a, adapters)
    expected_h = reference.lora_shrink(x.float(), a.float(), adapters)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, expected_h, atol=bound, rtol=bound)
    kept = y.clone()
    got = OPS.lora_expand(y, expected_h, b, adapters)
    expected = reference.lora_expand(y.float(), expected_h, b.float(), adapters)
    assert got.dtype == dtype
    assert torch.equal(y, kept)
    torch.testing.assert_close(got.float(), expected, atol=bound, rtol=bound)
    assert torch.equal(got[adapters == 0].view(torch.uint8), y[adapters == 0].view(torch.uint8))


def test_rows_without_adapter_keep_their_bits(device: torch.device) -> None:
    """Negative zero and what is no number too, beside rows that change."""
    y = torch.tensor([[-0.0, torch.nan, torch.inf, 1.5]] * 3, device=device)
    adapters = torch.tensor([0, 1, 0], device=device)
    b = torch.stack((torch.zeros(4, 2), torch.ones(4, 2))).to(device)
    got = OPS.lora_expand(y, torch.ones((3, 2), device=device), b, adapters)
    assert torch.equal(got[::2].view(torch.int32), y[::2].view(torch.int32))
    assert got[1, 3] == 3.5


def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype, device: torch.device) -> None:
    x, a = random(5, 300, seed=0).to(dtype).to(device), random(4, 16, 300, seed=1).to(dtype).to(device)
    mixed = torch.tensor([1, 2, 0, 3, 1], device=device)
    alone = torch.cat([OPS.lora_shrink(x[i : i + 1], a, mixed[i : i + 1]) for i in range(5)])
    assert torch.equal(OPS.lora_shrink(x, a, mixed), alone)
