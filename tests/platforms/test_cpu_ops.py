"""The CPU's op providers against the references computed in float32."""

import itertools
from collections.abc import Callable

import pytest
import torch

from fairlead.ops import reference
from fairlead.ops.table import OP_NAMES, TOLERANCE
from fairlead_cpu import native, topology
from fairlead_cpu.native_lora import lora_providers
from fairlead_cpu.native_sampling import sampling_providers
from fairlead_cpu.ops import TORCH, providers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def find_cases() -> list[tuple[str, str, Callable[..., object]]]:
    """Op, name, function of every provider, the native ones of every instruction set that this machine can run."""
    cases = [(op, provider.name, provider.fn) for op, provider in TORCH.items()]
    for isa in native.usable():
        kernels = native.Kernels(isa, topology.Layout(cpus=(-1, -1), bound=False, reason="test"))
        elsewhere = sampling_providers(kernels) | lora_providers(kernels)  # test_cpu_sampling.py
        own = [(op, found[0]) for op, found in providers(kernels).items() if op not in elsewhere]
        cases += [(op, f"{provider.name} {isa}", provider.fn) for op, provider in own]
    return cases


CASES = find_cases()


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
    if op == "gemma_rms_norm":
        return [rows(size), weight, 1e-5]
    if op == "layer_norm":
        return [3 + rows(size), weight, None if num_rows == 7 else rows(size).sum(0), 1e-5]
    if op in ("silu_and_mul", "gelu_and_mul"):
        return [rows(2 * size)]
    if op == "embedding":
        return [
            torch.randint(0, 50, (num_rows,), generator=generator),
            torch.randn(50, size, generator=generator).to(dtype),
        ]
    if op == "rotary_embedding":
        return rotary_args(rows, num_rows, 2 * (size % 40 + 1), interleaved=sliced)
    raise AssertionError(f"no test arguments for {op}; add them with its first provider")


def rotary_args(
    rows: Callable[[int], torch.Tensor], num_rows: int, head_size: int, *, interleaved: bool
) -> list[object]:
    """Three query heads and a kv-head at positions that repeat, beside other things in a row."""
    q, k = (rows(n * head_size).unflatten(1, (n, head_size)) for n in (3, 1))
    angles = torch.linspace(0, 6, 20)[:, None] * torch.linspace(1, 0.1, head_size // 2)
    angles = angles.repeat_interleave(2, dim=1) if interleaved else angles.repeat(1, 2)
    positions = torch.arange(num_rows) * 7 % 20
    return [q, k, positions, angles.cos().to(q.dtype), angles.sin().to(q.dtype), interleaved]


def outputs(result: object) -> list[torch.Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("op", "name", "fn"), CASES, ids=[f"{op}-{name}" for op, name, _ in CASES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliced", [False, True], ids=["contiguous", "sliced"])
def test_provider_equals_reference(op: str, name: str, fn: Callable[..., object], dtype: str, sliced: bool) -> None:
    for num_rows, size in itertools.product((0, 1, 7, 64), (1, 3, 64, 65, 576)):
        args = make_args(op, num_rows, size, DTYPES[dtype], sliced=sliced)
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        found = outputs(fn(*args))
        expected = outputs(getattr(reference, op)(*(in_float32(a) for a in args)))
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == DTYPES[dtype]
            torch.testing.assert_close(x.float(), y, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        for was, now in zip(before, args, strict=True):
            assert not isinstance(was, torch.Tensor) or torch.equal(was, now), "an input was changed"
        for x in found:
            assert all(x.data_ptr() != a.data_ptr() for a in args if isinstance(a, torch.Tensor) and x.numel())


def in_float32(argument: object) -> object:
    is_floating = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.float() if is_floating else argument


def test_providers_are_for_ops_of_the_contract() -> None:
    assert {op for op, _, _ in CASES} <= set(OP_NAMES)
    assert len({(op, name) for op, name, _ in CASES}) == len(CASES)


@pytest.mark.parametrize(("op", "name", "fn"), CASES, ids=[f"{op}-{name}" for op, name, _ in CASES])
def test_rows_do_not_depend_on_each_other(op: str, name: str, fn: Callable[..., object]) -> None:
    if op == "embedding":
        pytest.skip("ids have no NaN")
    args = make_args(op, 9, 65, torch.float32, sliced=False)
    poisoned = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    for a in poisoned:
        if isinstance(a, torch.Tensor) and len(a) == 9 and a.is_floating_point():
            a[4] = torch.nan
    others = [i for i in range(9) if i != 4]
    for x, y in zip(outputs(fn(*args)), outputs(fn(*poisoned)), strict=True):
        assert torch.equal(x[others], y[others])
        assert y[4].isnan().all()


@pytest.mark.parametrize(
    ("op", "name", "fn"),
    [c for c in CASES if c[1] != "torch"],
    ids=[f"{c[0]}-{c[1]}" for c in CASES if c[1] != "torch"],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(op: str, name: str, fn: Callable[..., object], dtype: str) -> None:
    """700 rows of 131 are shared among threads; one row alone is not."""
    args = make_args(op, 700, 131, DTYPES[dtype], sliced=False)
    together = outputs(fn(*args))
    for row in (0, 1, 350, 699):
        alone = [a[row : row + 1] if isinstance(a, torch.Tensor) and a.shape[0] == 700 else a for a in args]
        for x, y in zip(outputs(fn(*alone)), together, strict=True):
            assert torch.equal(x[0], y[row])
