"""Products against the dequantised weight, within the tolerance of the scheme."""

import pytest
import torch

from fairlead.interface import LinearMethod, LinearShape
from fairlead.ops import linear as reference
from fairlead.ops.linear import TOLERANCE
from fairlead.ops.memory import PooledAllocator
from fairlead.ops.table import OP_NAMES, choose_ops
from fairlead_triton.linear import Fp8Linear, ScaledMatmulLinear, fp8_dtype, linear_methods
from fairlead_triton.matmul import Matmul
from fairlead_triton.ops import providers
from fairlead_triton.tuning import Tuning

SHAPES = [(0, 17, 40), (1, 33, 128), (17, 40, 129)]


def random(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


@pytest.fixture
def allocator(device: torch.device) -> PooledAllocator:
    return PooledAllocator(lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device))


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm().clamp(min=1e-30))


def check(
    method: LinearMethod, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, bound: float
) -> object:
    num_rows, num_outputs, num_inputs = shape
    x = random(num_rows, num_inputs + 3, seed=0, dtype=dtype, device=device)[:, 1:-2]
    weight = random(num_inputs, num_outputs, seed=1, dtype=dtype, device=device).t()
    bias = random(num_outputs, seed=2, dtype=dtype, device=device)
    kept = x.clone()
    packed = method.pack({"weight": weight})
    dense = method.dequantise(packed).float()
    assert dense.shape == weight.shape
    for b in (None, bias):
        got = method.apply(x, packed, b)
        assert got.shape == (num_rows, num_outputs)
        assert got.dtype == dtype
        expected = x.float() @ dense.t() + (0 if b is None else b.float())
        assert not num_rows or error(got, expected) <= bound
    assert torch.equal(x, kept)
    return packed


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_schemes(
    scheme: str, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, allocator: PooledAllocator
) -> None:
    method = linear_methods("sm_90", allocator)[scheme][0]
    name = str(dtype).removeprefix("torch.")
    linear_shape = LinearShape(in_features=shape[2], out_features=shape[1], dtype=name)
    if scheme == "int4" and dtype == torch.float32:
        assert "float32" in (method.refuses(linear_shape) or "")
        return
    assert method.refuses(linear_shape) is None
    packed = check(method, shape, dtype, device, TOLERANCE[scheme][name])
    assert method.packed_bytes(linear_shape) == allocator.allocated_bytes("weights")
    weight = random(shape[2], shape[1], seed=1, dtype=dtype, device=device).t()
    own = reference.Int8Linear() if scheme == "int8" else reference.Int4Linear()
    torch.testing.assert_close(method.dequantise(packed), own.dequantise(own.pack({"weight": weight})))


def test_int8_is_the_references_very_sum(device: torch.device, allocator: PooledAllocator) -> None:
    """Integers: float32 rows give what the reference gives, whatever shares the batch."""
    method, own = linear_methods("sm_90", allocator)["int8"][0], reference.Int8Linear()
    x = random(18, 200, seed=0, dtype=torch.float32, device=device)
    weight = {"weight": random(30, 200, seed=1, dtype=torch.float32, device=device)}
    packed = method.pack(weight)
    whole = method.apply(x, packed, None)
    torch.testing.assert_close(whole, own.apply(x, own.pack(weight), None), atol=1e-5, rtol=1e-5)
    assert torch.equal(method.apply(x[7:8], packed, None)[0], whole[7])


def test_int8_refuses_sums_that_overflow(allocator: PooledAllocator) -> None:
    method = linear_methods("sm_90", allocator)["int8"][0]
    reason = method.refuses(LinearShape(in_features=140_000, out_features=8, dtype="bfloat16"))
    assert reason is not None
    assert "140000 inputs" in reason


@pytest.mark.parametrize("shape", [(0, 17, 40), (1, 33, 129), (17, 20, 40)])
def test_fp8(shape: tuple[int, int, int], device: torch.device, allocator: PooledAllocator) -> None:
    method = Fp8Linear(Tuning("sm_90"), allocator)
    if device.type != "cpu":
        pytest.skip("on a device its own 8-bit floats are tested, by test_fp8_on_its_device")
    packed = check(method, shape, torch.bfloat16, device, TOLERANCE["fp8"]["bfloat16"])
    own = reference.Fp8Linear()
    weight = random(shape[2], shape[1], seed=1, dtype=torch.bfloat16, device=device).t()
    torch.testing.assert_close(method.dequantise(packed), own.dequantise(own.pack({"weight": weight})))


def test_fp8_on_its_device(device: torch.device, allocator: PooledAllocator) -> None:
    if device.type == "cpu" or torch.version.hip is not None:
        pytest.skip("needs an NVIDIA device")
    key = "sm_{}{}".format(*torch.cuda.get_device_capability())
    for method in linear_methods(key, allocator).get("fp8", ()):
        if method.refuses(LinearShape(in_features=320, out_features=64, dtype="bfloat16")) is None:
            for num_rows in (0, 1, 17, 128):
                check(method, (num_rows, 64, 320), torch.bfloat16, device, TOLERANCE["fp8"]["bfloat16"])


def test_fp8_says_where_it_cannot_be(allocator: PooledAllocator) -> None:
    shape = LinearShape(in_features=64, out_features=64, dtype="bfloat16")
    expected = {
        "sm_80": None,
        "sm_89": torch.float8_e4m3fn,
        "sm_90": torch.float8_e4m3fn,
        "sm_120": torch.float8_e4m3fn,
        "gfx90a": None,
        "gfx942": torch.float8_e4m3fnuz,
        "gfx950": torch.float8_e4m3fn,
        "gfx1100": None,
        "xpu": None,
    }
    for device, dtype in expected.items():
        assert fp8_dtype(device) == dtype
        assert (Fp8Linear(Tuning(device), allocator).refuses(shape) is None) == (dtype is not None)
        assert ("fp8" in linear_methods(device, allocator)) == (dtype is not None)
        is_nvidia = device in ("sm_89", "sm_90", "sm_120")
        assert (ScaledMatmulLinear(Tuning(device), allocator).refuses(shape) is None) == is_nvidia
    method = ScaledMatmulLinear(Tuning("sm_90"), allocator)
    for refused in (
        LinearShape(in_features=64, out_features=64, dtype="float16"),
        LinearShape(in_features=65, out_features=64, dtype="bfloat16"),
    ):
        assert method.refuses(refused) is not None


@pytest.mark.parametrize("shape", [(0, 17, 40), (1, 1, 1), (16, 40, 300), (17, 40, 64)])
def test_plain(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    num_rows, num_outputs, num_inputs = shape
    x = random(num_rows, num_inputs + 1, seed=0, dtype=dtype, device=device)[:, 1:]
    weight = random(num_outputs, num_inputs, seed=1, dtype=dtype, device=device)
    bias = random(num_outputs, seed=2, dtype=dtype, device=device)
    for b in (None, bias):
        got = Matmul(Tuning("sm_90")).linear(x, weight, b)
        expected = torch.nn.functional.linear(x.float(), weight.float(), None if b is None else b.float())
        assert got.shape == expected.shape
        assert got.dtype == dtype
        assert not num_rows or error(got, expected) <= TOLERANCE["unquantized"][str(dtype).removeprefix("torch.")]


def test_rows_of_a_skinny_product_do_not_depend_on_each_other(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = (random(n, 500, seed=n, dtype=dtype, device=device) for n in (9, 20))
    linear = Matmul(Tuning("sm_90")).linear
    whole = linear(x, weight, None)
    assert all(torch.equal(linear(x[i : i + 1], weight, None)[0], whole[i]) for i in (0, 4, 8))


def test_every_op_has_a_provider_for_every_dtype() -> None:
    for device in ("sm_80", "gfx90a", "xpu"):
        table = providers(device)
        assert set(table) == set(OP_NAMES)
        for dtype in ("float32", "bfloat16", "float16"):
            assert set(choose_ops("triton", table, dtype=dtype)[1].values()) == {"triton"}
        assert set(choose_ops("triton", table, dtype="float64")[1].values()) == {"reference"}
