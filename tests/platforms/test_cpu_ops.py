"""The CPU's op providers against the references computed in float32."""

from collections.abc import Callable

import pytest
import torch

from fairlead.ops import reference
from fairlead.ops.table import OP_NAMES, TOLERANCE
from fairlead_cpu.ops import PROVIDERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [(op, provider.name, provider.fn) for op, providers in PROVIDERS.items() for provider in providers]


def make_args(op: str, num_rows: int, size: int, dtype: torch.dtype, *, sliced: bool) -> list[object]:
    """Arguments of an op whose tensors have `num_rows` rows of `size`; `sliced` makes them views of wider ones."""
    generator = torch.Generator().manual_seed(num_rows * 1000 + size)

    def rows(width: int) -> torch.Tensor:
        wide = torch.randn(num_rows, 3 * width, generator=generator).to(dtype)
        return wide[:, width : 2 * width] if sliced else wide[:, :width].contiguous()

    weight = (1 + 0.1 * torch.randn(size, generator=generator)).to(dtype)
    if op == "rms_norm":
        return [rows(size), weight, 1e-5]
    if op == "fused_add_rms_norm":
        return [rows(size), rows(size), weight, 1e-5]
    raise AssertionError(f"no test arguments for {op}; add them with its first provider")


def outputs(result: object) -> list[torch.Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("op", "name", "fn"), CASES, ids=[f"{op}-{name}" for op, name, _ in CASES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 64])
@pytest.mark.parametrize("size", [1, 3, 64, 65, 576])
def test_provider_equals_reference(
    op: str, name: str, fn: Callable[..., object], dtype: str, sliced: bool, num_rows: int, size: int
) -> None:
    args = make_args(op, num_rows, size, DTYPES[dtype], sliced=sliced)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    found = outputs(fn(*args))
    expected = outputs(getattr(reference, op)(*(a.float() if isinstance(a, torch.Tensor) else a for a in args)))
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == DTYPES[dtype]
        torch.testing.assert_close(x.float(), y, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for was, now in zip(before, args, strict=True):
        assert not isinstance(was, torch.Tensor) or torch.equal(was, now), "an input was changed"
    for x in found:
        assert all(x.data_ptr() != a.data_ptr() for a in args if isinstance(a, torch.Tensor) and x.numel())


def test_providers_are_for_ops_of_the_contract() -> None:
    assert set(PROVIDERS) <= set(OP_NAMES)
    assert all(len({p.name for p in providers}) == len(providers) for providers in PROVIDERS.values())


@pytest.mark.parametrize(("op", "name", "fn"), CASES, ids=[f"{op}-{name}" for op, name, _ in CASES])
def test_rows_do_not_depend_on_each_other(op: str, name: str, fn: Callable[..., object]) -> None:
    args = make_args(op, 9, 65, torch.float32, sliced=False)
    poisoned = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    poisoned[0][4] = torch.nan
    others = [i for i in range(9) if i != 4]
    for x, y in zip(outputs(fn(*args)), outputs(fn(*poisoned)), strict=True):
        assert torch.equal(x[others], y[others])
        assert y[4].isnan().all()
