"""Ways to store and multiply linear weights, behind `fairlead.interface.linear.LinearMethod`.

Shapes: N rows, I inputs, O outputs, G groups of inputs.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fairlead.interface import LinearMethod, LinearShape, MemoryAllocator
from fairlead.ops.linear import INT4_GROUP, QuantizedWeight
from fairlead_triton.matmul import INT4_HALF, Matmul
from fairlead_triton.quantise import RowQuantiser
from fairlead_triton.tuning import Tuning

Tensor = torch.Tensor
NAME = "triton"
_ALIGN = 16  # bytes: the weights' rows start at multiples, so that they are read in the widest loads
_SLICE = 1024  # outputs that are packed at a time, which bounds what packing takes beside the result


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """`values` of 8 bits (O, I filled up) or two of 4 bits in a byte (O, G * 64); scales (O,) or (O, G) in float32."""

    values: Tensor
    scales: Tensor
    in_features: int


class Int8Linear:
    """Scheme "int8": weights rounded by output, rows by token; products and their sum are exact integers."""

    name = NAME

    def __init__(self, tuning: Tuning, allocator: MemoryAllocator) -> None:
        self._allocator, self._matmul, self._quantise = allocator, Matmul(tuning), RowQuantiser(tuning)

    def refuses(self, shape: LinearShape) -> str | None:
        """Only sums that 32 bits cannot hold."""
        most = (2**31 - 1) // 127**2
        return None if shape.in_features <= most else f"{shape.in_features} inputs; sums of more than {most} overflow"

    def packed_bytes(self, shape: LinearShape) -> int:
        """A byte a weight, in rows of whole alignments, and a scale an output."""
        return shape.out_features * (_aligned(shape.in_features) + 4)

    def pack(self, tensors: Mapping[str, Tensor]) -> object:
        """Rounds a slice of the outputs at a time."""
        weight_OI = tensors["weight"]
        num_outputs, num_inputs = weight_OI.shape
        values = self._allocator.empty((num_outputs, _aligned(num_inputs)), torch.int8, tag="weights").zero_()
        scales_O = self._allocator.empty((num_outputs,), torch.float32, tag="weights")

        def keep(rows: slice, part: QuantizedWeight) -> None:
            values[rows, :num_inputs] = part.values.flatten(1)
            scales_O[rows] = part.scales.flatten()

        _in_slices(weight_OI, num_inputs, 127, keep)
        return PackedWeight(values=values, scales=scales_O, in_features=num_inputs)

    def apply(self, x_NI: Tensor, packed: object, bias_O: Tensor | None) -> Tensor:
        """Two launches: rows are rounded, then multiplied."""
        assert isinstance(packed, PackedWeight)
        rows = self._quantise(x_NI, torch.int8)
        return self._matmul.eight_bit(rows, packed.values, packed.scales, bias_O, x_NI.dtype)

    def dequantise(self, packed: object) -> Tensor:
        """In float32."""
        assert isinstance(packed, PackedWeight)
        return packed.values[:, : packed.in_features].float() * packed.scales[:, None]


class Int4Linear:
    """Scheme "int4": weights alone are rounded, in groups of INT4_GROUP inputs; two stand in a byte."""

    name = NAME

    def __init__(self, tuning: Tuning, allocator: MemoryAllocator) -> None:
        self._allocator, self._matmul = allocator, Matmul(tuning)
        assert INT4_GROUP == 2 * INT4_HALF

    def refuses(self, shape: LinearShape) -> str | None:
        """float32, whose tiles spill: it is for comparisons, which the reference serves."""
        return None if shape.dtype != "float32" else "the kernel multiplies rows of 16 bits, not float32"

    def packed_bytes(self, shape: LinearShape) -> int:
        """Half a byte a weight and a scale a group, the last of which is filled up."""
        return shape.out_features * -(-shape.in_features // INT4_GROUP) * (INT4_HALF + 4)

    def pack(self, tensors: Mapping[str, Tensor]) -> object:
        """Rounds a slice of the outputs at a time."""
        weight_OI = tensors["weight"]
        num_outputs, num_inputs = weight_OI.shape
        num_groups = -(-num_inputs // INT4_GROUP)
        values = self._allocator.empty((num_outputs, num_groups * INT4_HALF), torch.uint8, tag="weights")
        scales_OG = self._allocator.empty((num_outputs, num_groups), torch.float32, tag="weights")

        def keep(rows: slice, part: QuantizedWeight) -> None:
            numbers = (part.values + 8).to(torch.uint8)
            values[rows] = (numbers[..., :INT4_HALF] | (numbers[..., INT4_HALF:] << 4)).flatten(1)
            scales_OG[rows] = part.scales[..., 0]

        _in_slices(weight_OI, INT4_GROUP, 7, keep)
        return PackedWeight(values=values, scales=scales_OG, in_features=num_inputs)

    def apply(self, x_NI: Tensor, packed: object, bias_O: Tensor | None) -> Tensor:
        """One launch."""
        assert isinstance(packed, PackedWeight)
        return self._matmul.int4(x_NI, packed.values, packed.scales, bias_O)

    def dequantise(self, packed: object) -> Tensor:
        """In float32."""
        assert isinstance(packed, PackedWeight)
        groups = packed.values.view(*packed.scales.shape, INT4_HALF)
        numbers = torch.cat((groups & 15, groups >> 4), dim=-1).float() - 8
        return (numbers * packed.scales[..., None]).flatten(1)[:, : packed.in_features]


class Fp8Linear:
    """Scheme "fp8": weights rounded to the device's 8-bit floats by output, rows by token."""

    name = NAME

    def __init__(self, tuning: Tuning, allocator: MemoryAllocator) -> None:
        self._allocator, self._matmul, self._quantise = allocator, Matmul(tuning), RowQuantiser(tuning)
        self._device, self._dtype = tuning.device, fp8_dtype(tuning.device)

    def refuses(self, shape: LinearShape) -> str | None:
        """Where the device multiplies no 8-bit floats."""
        return None if self._dtype is not None else f"{self._device} multiplies no 8-bit floats"

    def packed_bytes(self, shape: LinearShape) -> int:
        """A byte a weight, in rows of whole alignments, and a scale an output."""
        return shape.out_features * (_aligned(shape.in_features) + 4)

    def pack(self, tensors: Mapping[str, Tensor]) -> object:
        """Rounds a slice of the outputs at a time, as rows are rounded."""
        weight_OI = tensors["weight"]
        num_outputs, num_inputs = weight_OI.shape
        assert self._dtype is not None
        bits = self._allocator.empty((num_outputs, _aligned(num_inputs)), torch.uint8, tag="weights").zero_()
        scales_O = self._allocator.empty((num_outputs,), torch.float32, tag="weights")
        for first in range(0, num_outputs, _SLICE):
            rows = slice(first, first + _SLICE)
            part = self._quantise(weight_OI[rows], self._dtype)
            bits[rows, :num_inputs] = part.raw()
            scales_O[rows] = part.scales
        return PackedWeight(values=bits, scales=scales_O, in_features=num_inputs)

    def apply(self, x_NI: Tensor, packed: object, bias_O: Tensor | None) -> Tensor:
        """Two launches: rows are rounded, then multiplied."""
        assert isinstance(packed, PackedWeight)
        assert self._dtype is not None
        rows = self._quantise(x_NI, self._dtype)
        return self._matmul.eight_bit(rows, packed.values.view(self._dtype), packed.scales, bias_O, x_NI.dtype)

    def dequantise(self, packed: object) -> Tensor:
        """In float32."""
        assert isinstance(packed, PackedWeight)
        assert self._dtype is not None
        return packed.values.view(self._dtype)[:, : packed.in_features].float() * packed.scales[:, None]


class ScaledMatmulLinear(Fp8Linear):
    """The same weights, multiplied by torch's scaled product where it has one by row: NVIDIA's from sm_89 on."""

    name = "scaled_mm"

    def refuses(self, shape: LinearShape) -> str | None:
        """What torch's product by row does not take."""
        if not _has_scaled_matmul(self._device):
            return f"torch multiplies no 8-bit floats by row on {self._device}"
        if shape.dtype != "bfloat16":
            return f"its results are bfloat16, not {shape.dtype}"
        if shape.in_features % _ALIGN or shape.out_features % _ALIGN:
            return f"{shape.out_features} x {shape.in_features} are no multiples of {_ALIGN}"
        return None

    def apply(self, x_NI: Tensor, packed: object, bias_O: Tensor | None) -> Tensor:
        """Rows are rounded, then multiplied by torch; the bias is added in bfloat16."""
        assert isinstance(packed, PackedWeight)
        assert self._dtype is not None
        if len(x_NI) == 0:
            return torch.empty((0, len(packed.scales)), dtype=x_NI.dtype, device=x_NI.device)
        rows = self._quantise(x_NI, self._dtype)
        out_NO = torch._scaled_mm(
            rows.values,
            packed.values.view(self._dtype).t(),
            scale_a=rows.scales[:, None],
            scale_b=packed.scales[None, :],
            out_dtype=x_NI.dtype,
        )
        return out_NO if bias_O is None else out_NO + bias_O


def linear_methods(device: str, allocator: MemoryAllocator) -> Mapping[str, tuple[LinearMethod, ...]]:
    """The methods of a device (see `tuning`) by scheme. Unquantised weights go through the op "linear"."""
    tuning = Tuning(device)
    methods: dict[str, tuple[LinearMethod, ...]] = {
        "int8": (Int8Linear(tuning, allocator),),
        "int4": (Int4Linear(tuning, allocator),),
    }
    if fp8_dtype(device) is not None:
        methods["fp8"] = fp8_methods(device, allocator)
    return methods


def fp8_methods(device: str, allocator: MemoryAllocator) -> tuple[LinearMethod, ...]:
    """The methods of the scheme "fp8", torch's first; both refuse where the device multiplies no such floats."""
    tuning = Tuning(device)
    return ScaledMatmulLinear(tuning, allocator), Fp8Linear(tuning, allocator)


def fp8_dtype(device: str) -> torch.dtype | None:
    """The 8-bit floats that a device multiplies, None if it does not."""
    if device == "gfx942":
        return torch.float8_e4m3fnuz
    if _has_scaled_matmul(device) or device == "gfx950" or device.startswith("gfx12"):
        return torch.float8_e4m3fn
    return None


def _has_scaled_matmul(device: str) -> bool:
    found = re.fullmatch(r"sm_(\d+)", device)
    return found is not None and int(found[1]) >= 89


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _in_slices(
    weight_OI: Tensor, group_size: int, max_value: int, keep: Callable[[slice, QuantizedWeight], None]
) -> None:
    for first in range(0, len(weight_OI), _SLICE):
        rows = slice(first, first + _SLICE)
        part = QuantizedWeight.of(weight_OI[rows], group_size=group_size, max_value=max_value, allocator=None)
        keep(rows, part)
