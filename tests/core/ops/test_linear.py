"""Schemes of linear weights: what their references mean, and who serves them."""

from collections.abc import Mapping

import pytest
import torch
from torch.nn import functional

from fairlead.errors import ConfigError, PluginContractError
from fairlead.interface import UNQUANTIZED, LinearMethod, LinearShape
from fairlead.ops import reference
from fairlead.ops.linear import INT4_GROUP, TOLERANCE, Fp8Linear, Int4Linear, Int8Linear, LinearTable, PlainLinear

SHAPES = [(1, 1, 1), (3, 64, 96), (5, 200, 33), (0, 128, 7), (70, 129, 2)]
SHAPE = LinearShape(in_features=64, out_features=96, dtype="float32")
METHODS: dict[str, LinearMethod] = {
    UNQUANTIZED: PlainLinear(reference.linear),
    "int8": Int8Linear(),
    "int4": Int4Linear(),
    "fp8": Fp8Linear(),
}


class Picky:
    """A method that serves square layers only."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuses(self, shape: LinearShape) -> str | None:
        return None if shape.in_features == shape.out_features else "it is not square"

    def packed_bytes(self, shape: LinearShape) -> int:
        return 1

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> object:
        return tensors["weight"]

    def apply(self, x_NI: torch.Tensor, packed: object, bias_O: torch.Tensor | None) -> torch.Tensor:
        assert isinstance(packed, torch.Tensor)
        return functional.linear(x_NI, packed, bias_O)

    def dequantise(self, packed: object) -> torch.Tensor:
        assert isinstance(packed, torch.Tensor)
        return packed


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.empty(shape).normal_(generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scheme", METHODS)
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_apply_is_a_product_with_the_dequantised_weight(size: tuple[int, int, int], scheme: str, dtype: str) -> None:
    num_rows, num_inputs, num_outputs = size
    torch_dtype: torch.dtype = getattr(torch, dtype)
    x, weight, bias = (
        random(*shape, seed=i).to(torch_dtype)
        for i, shape in enumerate(((num_rows, num_inputs), (num_outputs, num_inputs), (num_outputs,)))
    )
    method = METHODS[scheme]
    packed = method.pack({"weight": weight})
    dequantised = method.dequantise(packed)
    assert dequantised.shape == weight.shape
    for given in (None, bias):
        before = x.clone()
        found = method.apply(x, packed, given)
        assert torch.equal(x, before)
        assert (found.shape, found.dtype) == ((num_rows, num_outputs), torch_dtype)
        expected = functional.linear(x.float(), dequantised.float(), None if given is None else given.float())
        assert float((found.float() - expected).norm()) <= TOLERANCE[scheme][dtype] * float(expected.norm())


@pytest.mark.parametrize(("scheme", "group", "max_value"), [("int8", 200, 127), ("int4", INT4_GROUP, 7)])
def test_each_weight_is_within_half_a_step(scheme: str, group: int, max_value: int) -> None:
    weight = random(33, 200)
    weight[3] = 0.0
    method = METHODS[scheme]
    found = method.dequantise(method.pack({"weight": weight}))
    for start in range(0, 200, group):
        part = weight[:, start : start + group]
        step = part.abs().amax(1, keepdim=True) / max_value
        assert bool(((found[:, start : start + group] - part).abs() <= step / 2 * (1 + 1e-4)).all())


def test_each_weight_is_within_half_a_step_of_a_float_of_8_bits() -> None:
    weight = random(33, 200)
    weight[3] = 0.0
    weight[4, 0] = 1e6  # beside which the others are nothing
    found = METHODS["fp8"].dequantise(METHODS["fp8"].pack({"weight": weight}))
    smallest = weight.abs().amax(1, keepdim=True) / 448 * 2**-10
    assert bool(((found - weight).abs() <= (weight.abs() * 2**-4).clamp(min=smallest) * (1 + 1e-4)).all())
    assert bool(found[3].eq(0).all())
    assert float(found[4, 0]) == pytest.approx(1e6)


@pytest.mark.parametrize("scheme", METHODS)
def test_packed_bytes_are_what_pack_takes(scheme: str) -> None:
    method, weight = METHODS[scheme], random(96, 64)
    packed = method.pack({"weight": weight})
    held = [packed] if isinstance(packed, torch.Tensor) else [packed.values, packed.scales]  # type: ignore[attr-defined]
    assert method.packed_bytes(SHAPE) == sum(tensor.nbytes for tensor in held)


def test_a_weight_that_is_shared_costs_nothing_more() -> None:
    assert METHODS[UNQUANTIZED].packed_bytes(LinearShape(in_features=4, out_features=4, dtype="float32")) == 64
    shared = LinearShape(in_features=4, out_features=4, dtype="float32", is_shared=True)
    assert METHODS[UNQUANTIZED].packed_bytes(shared) == 0


def test_the_first_method_that_does_not_refuse_is_chosen_layer_by_layer() -> None:
    table = LinearTable("acme", {UNQUANTIZED: (Picky("a"), Picky("b"))}, reference.linear)
    square = LinearShape(in_features=8, out_features=8, dtype="float32")
    assert table.choose(UNQUANTIZED, square).name == "a"
    assert table.choose(UNQUANTIZED, SHAPE).name == "reference"
    assert table.choose("int8", square).name == "reference"
    assert table.chosen == {UNQUANTIZED: ("a", "reference"), "int8": ("reference",)}


def test_a_name_that_was_asked_for_is_chosen_or_says_why_not() -> None:
    table = LinearTable("acme", {UNQUANTIZED: (Picky("a"), Picky("b"))}, reference.linear, wanted="b")
    assert table.choose(UNQUANTIZED, LinearShape(in_features=8, out_features=8, dtype="float32")).name == "b"
    assert table.choose("int4", SHAPE).name == "reference"  # which has none of that name
    with pytest.raises(ConfigError, match="provider 'b' of op 'linear' cannot be used: it is not square"):
        table.choose(UNQUANTIZED, SHAPE)


def test_a_scheme_that_the_contract_does_not_have_is_refused() -> None:
    expected = "plugin 'acme' broke the contract in linear_methods: expected schemes among unquantized, int8, int4"
    with pytest.raises(PluginContractError, match=expected):
        LinearTable("acme", {"int3": (Picky("a"),)}, reference.linear)
