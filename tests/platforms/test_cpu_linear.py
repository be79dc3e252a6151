"""Native linear layers, by every instruction set that this machine can run, against the weight that they stand for."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn import functional

from fairlead.interface import UNQUANTIZED, LinearShape
from fairlead.ops.linear import TOLERANCE, Int8Linear
from fairlead_cpu import native, topology
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.linear import MAX_INT8_INPUTS, NativeLinear, PackedLinear

SCHEMES = (UNQUANTIZED, "int8", "int4")
DTYPES = ("float32", "bfloat16")
# Rows, inputs, outputs: around tiles of 12, 16 and 32 rows, panels of 16 outputs, and blocks of 64 to 512 inputs.
SIZES = [
    (1, 1, 1),
    (2, 64, 32),
    (3, 65, 33),
    (7, 200, 100),
    (8, 576, 95),
    (9, 63, 16),
    (31, 1000, 17),
    (32, 513, 64),
    (33, 130, 130),
    (64, 300, 48),
    (257, 70, 50),
    (29, 1100, 330),  # blocks of two groups and one
    (50, 640, 225),
    (600, 257, 65),
]

pytestmark = pytest.mark.skipif(not native.usable(), reason="fairlead-cpu was built without kernels")


@pytest.fixture(scope="module", params=native.usable())
def kernels(request: pytest.FixtureRequest) -> Iterator[native.Kernels]:
    """The library of one instruction set, with three threads whatever the machine has."""
    layout = topology.Layout(cpus=(-1, -1, -1), bound=False, reason="test")
    kernels = native.Kernels(request.param, layout)
    yield kernels
    kernels.call.fl_pool_shutdown()


def method(kernels: native.Kernels, scheme: str) -> NativeLinear:
    return NativeLinear(scheme, kernels, HostAllocator())


def random(*shape: int, dtype: str, seed: int = 0) -> torch.Tensor:
    values = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))
    return values.to(getattr(torch, dtype))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_apply_is_a_product_with_the_dequantised_weight(kernels: native.Kernels, scheme: str, dtype: str) -> None:
    linear = method(kernels, scheme)
    for num_rows, num_inputs, num_outputs in SIZES:
        weight = random(num_outputs, num_inputs, dtype=dtype)
        packed = linear.pack({"weight": weight})
        x, bias = random(num_rows, num_inputs, dtype=dtype, seed=1), random(num_outputs, dtype=dtype, seed=2)
        for given in (None, bias):
            before = x.clone()
            found = linear.apply(x, packed, given)
            assert torch.equal(x, before)
            assert (found.shape, found.dtype) == ((num_rows, num_outputs), x.dtype)
            expected = functional.linear(
                x.float(), linear.dequantise(packed).float(), None if given is None else given.float()
            )
            assert error(found, expected) <= TOLERANCE[scheme][dtype], (num_rows, num_inputs, num_outputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(kernels: native.Kernels, scheme: str, dtype: str) -> None:
    linear = method(kernels, scheme)
    for num_inputs, num_outputs in ((576, 95), (1100, 40)):
        packed = linear.pack({"weight": random(num_outputs, num_inputs, dtype=dtype)})
        x = random(530, num_inputs, dtype=dtype, seed=1)
        together = linear.apply(x, packed, None)
        for size in (1, 2, 3, 7, 8, 9, 13, 31, 32, 33, 64, 257):
            for start in (0, 5, 530 - size):
                part = linear.apply(x[start : start + size], packed, None)
                assert torch.equal(part, together[start : start + size]), (size, start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_number_of_threads_does_not_show(kernels: native.Kernels, scheme: str, dtype: str) -> None:
    linear = method(kernels, scheme)
    packed = linear.pack({"weight": random(330, 200, dtype=dtype)})
    x = random(700, 200, dtype=dtype, seed=1)
    by_three = linear.apply(x, packed, None)
    kernels.call.fl_pool_init(1, None)
    by_one = linear.apply(x, packed, None)
    kernels.call.fl_pool_init(3, None)
    assert torch.equal(by_one, by_three)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_and_empty_rows(kernels: native.Kernels, scheme: str) -> None:
    linear = method(kernels, scheme)
    packed = linear.pack({"weight": random(40, 128, dtype="bfloat16")})
    wide = random(9, 300, dtype="bfloat16", seed=1)
    for x in (wide[:, 7:135], wide[::2, :128], wide[:1, 1:129].expand(5, 128), wide[:, :128].t().contiguous().t()):
        assert torch.equal(linear.apply(x, packed, None), linear.apply(x.clone(), packed, None))
    assert linear.apply(wide[:0, :128], packed, None).shape == (0, 40)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_transposed_weight_packs_like_a_plain_one(kernels: native.Kernels, scheme: str) -> None:
    linear = method(kernels, scheme)
    weight = random(70, 50, dtype="float32")
    packed, transposed = linear.pack({"weight": weight}), linear.pack({"weight": weight.t().contiguous().t()})
    assert torch.equal(linear.dequantise(packed), linear.dequantise(transposed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_quantised_is_kept_as_it_is(kernels: native.Kernels, dtype: str) -> None:
    weight = random(45, 70, dtype=dtype)
    linear = method(kernels, UNQUANTIZED)
    assert torch.equal(linear.dequantise(linear.pack({"weight": weight})), weight)


def test_int8_weights_are_those_of_the_reference(kernels: native.Kernels) -> None:
    weight = random(45, 200, dtype="float32")
    weight[3] = 0.0
    linear, reference = method(kernels, "int8"), Int8Linear()
    found = linear.dequantise(linear.pack({"weight": weight}))
    expected = reference.dequantise(reference.pack({"weight": weight}))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((found - weight).abs() <= 0.5001 * step).all())
    assert float((found != expected).float().mean()) < 0.01  # a tie may fall to the other side
    torch.testing.assert_close(found[3], torch.zeros(200), rtol=0, atol=0)


def test_int4_weights_are_within_half_a_step_of_their_group(kernels: native.Kernels) -> None:
    weight = random(45, 200, dtype="float32")
    weight[3] = 0.0
    linear = method(kernels, "int4")
    found = linear.dequantise(linear.pack({"weight": weight}))
    for start in range(0, 200, 32):
        part = weight[:, start : start + 32]
        largest = part.abs().amax(1, keepdim=True)
        # bfloat16 scales are off by up to 2^-9; on the side that ends at 7 a number may lie half a step further out
        assert bool(((found[:, start : start + 32] - part).abs() <= largest / 8 * 1.02).all())
    assert error(found, weight) < 0.09


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_residual_in_one_pass(kernels: native.Kernels, scheme: str, name: str) -> None:
    linear, activation = method(kernels, scheme), ACTIVATIONS[name]
    weight, x = random(75, 96, dtype="float32"), random(33, 96, dtype="float32", seed=1) * 0.5
    bias, residual = random(75, dtype="float32", seed=2), random(33, 75, dtype="float32", seed=3)
    plain = linear.apply(x, linear.pack({"weight": weight}), bias)
    found = linear.apply_fused(x, linear.pack_fused({"weight": weight}, name), bias, residual)
    torch.testing.assert_close(found, activation(plain) + residual, rtol=1e-5, atol=2e-6)
    in_place = residual.clone()
    assert torch.equal(linear.apply_fused(x, linear.pack_fused({"weight": weight}, name), bias, in_place), found)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("name", "like"), [("silu", "silu"), ("gelu", "gelu_tanh")])
def test_gate_and_up_in_one_pass(kernels: native.Kernels, scheme: str, name: str, like: str) -> None:
    linear, activation = method(kernels, scheme), ACTIVATIONS[like]
    for width in (1, 16, 33, 100):
        weight, x = random(2 * width, 96, dtype="float32"), random(5, 96, dtype="float32", seed=1)
        bias = random(2 * width, dtype="float32", seed=2)
        packed = linear.pack_fused({"weight": weight}, f"{name}_and_mul")
        gate, up = linear.apply(x, linear.pack({"weight": weight}), bias).chunk(2, dim=1)
        found = linear.apply(x, packed, bias)
        torch.testing.assert_close(found, activation(gate) * up, rtol=1e-5, atol=2e-5)
        assert torch.equal(linear.dequantise(packed), linear.dequantise(linear.pack({"weight": weight})))


def test_activations_over_the_whole_range(kernels: native.Kernels) -> None:
    linear = method(kernels, UNQUANTIZED)
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-3e38, -1e4, -104.0, -88.0, 88.0, 89.5, 1e4, 3e38])])
    x = functional.pad(x, (0, -len(x) % 64)).view(-1, 64)
    for name, activation in ACTIVATIONS.items():
        found = linear.apply(x, linear.pack_fused({"weight": torch.eye(64)}, name), None)
        torch.testing.assert_close(found, activation(x.double()).float(), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_that_are_none_stay_in_their_row(kernels: native.Kernels, scheme: str, dtype: str) -> None:
    linear = method(kernels, scheme)
    packed = linear.pack({"weight": random(40, 96, dtype=dtype)})
    x = random(40, 96, dtype=dtype, seed=1)
    sound = linear.apply(x, packed, None)
    for number, row in ((float("nan"), 3), (float("inf"), 17), (float("-inf"), 39)):
        x[row, row] = number
    found = linear.apply(x, packed, None)
    broken = torch.zeros(40, dtype=torch.bool)
    broken[[3, 17, 39]] = True
    assert torch.equal(found[~broken], sound[~broken])
    assert not bool(found[broken].isfinite().any())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_may_move_while_the_engine_sleeps(kernels: native.Kernels, scheme: str) -> None:
    linear = method(kernels, scheme)
    packed = linear.pack({"weight": random(40, 96, dtype="bfloat16")})
    assert isinstance(packed, PackedLinear)
    x = random(3, 96, dtype="bfloat16", seed=1)
    expected = linear.apply(x, packed, None)
    contents = packed.memory.clone()
    packed.memory.untyped_storage().resize_(0)
    blocker = torch.empty_like(contents)
    packed.memory.untyped_storage().resize_(contents.nbytes)
    packed.memory.copy_(contents)
    assert torch.equal(linear.apply(x, packed, None), expected)
    assert blocker.nbytes == contents.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_bytes_is_what_packing_takes(kernels: native.Kernels, scheme: str, dtype: str) -> None:
    allocator = HostAllocator()
    linear = NativeLinear(scheme, kernels, allocator)
    packed = linear.pack({"weight": random(75, 200, dtype=dtype)})
    shape = LinearShape(in_features=200, out_features=75, dtype=dtype)
    assert linear.packed_bytes(shape) == allocator.allocated_bytes("weights")
    assert isinstance(packed, PackedLinear)


def test_what_it_cannot_serve_is_refused(kernels: native.Kernels) -> None:
    half = LinearShape(in_features=64, out_features=64, dtype="float16")
    long = LinearShape(in_features=MAX_INT8_INPUTS + 1, out_features=64, dtype="float32")
    for scheme in SCHEMES:
        assert method(kernels, scheme).refuses(half) == "the native kernels have no float16"
    assert method(kernels, "int8").refuses(long) == "65537 inputs are more than int8 sums hold (65536)"
    assert method(kernels, UNQUANTIZED).refuses(long) is None
