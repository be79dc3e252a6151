"""Linear layers by the native kernels: weights are packed once, in panels that the processor multiplies as they lie.

Shapes: N rows, I input features, O output features, P packed columns (O filled up to whole groups of 32).
"""

import ctypes
from collections.abc import Mapping

import torch

from fairlead.interface import GATED_ACTIVATIONS, UNQUANTIZED, LinearMethod, LinearShape, MemoryAllocator, MoeSpec
from fairlead_cpu.moe import PackedExperts, apply_experts
from fairlead_cpu.native import Kernels, LinearLayer, Offsets
from fairlead_cpu.native_ops import DTYPES

# The numbers of csrc/matmul.h.
ACTIVATIONS = {
    None: 0,
    "silu_and_mul": 1,
    "gelu_and_mul": 2,
    "gelu_tanh": 3,
    "gelu": 4,
    "relu": 5,
    "silu": 6,
}
_INEXACT = ("silu", "gelu", "gelu_tanh")  # the gated ones are the native ops' own, bit by bit
_FLOAT32, _BFLOAT16, _INT8, _INT4 = range(4)
_PANEL, _GROUP, _PAD_K = 16, 32, 64
_ALIGNMENT = 64
INT4_GROUP = 32
"""Inputs that share a scale (csrc/matmul.h): 4.5 bits a weight."""
MAX_INT8_INPUTS = 2**16
"""The sum of that many products of 8 bits fits 32."""


class PackedLinear:
    """One layer: its weight, scales and sums in one tensor, and the record that the kernels read.

    The tensor's memory may move while the engine sleeps, so the record's pointers are checked at every call.
    """

    __slots__ = ("_address", "_base", "dtype", "layer", "memory", "num_outputs", "offsets", "pair")

    def __init__(self, layer: LinearLayer, memory: torch.Tensor, offsets: Offsets, *, pair: bool) -> None:
        self.layer, self.memory, self.offsets, self.pair = layer, memory, offsets, pair
        self.num_outputs: int = layer.out
        self.dtype = torch.bfloat16 if layer.x_dtype else torch.float32
        self._base = 0
        self._address = ctypes.addressof(layer)

    def address(self) -> int:
        """Of the record, with pointers that are valid now."""
        base = self.memory.data_ptr()
        if base != self._base:
            self._base = base
            self.layer.weight, self.layer.scale, self.layer.sums = (base + offset for offset in self.offsets)
        return self._address


class NativeLinear:
    """LinearMethod of one scheme: "unquantized" (bfloat16, float32), "int8" or "int4"; with it come activations,
    residuals and experts (FusedLinearMethod, ExpertsMethod).

    Every element of a result is summed in one order, whatever the batch: a row has the same bits alone and in any.
    """

    name = "native"

    def __init__(self, scheme: str, kernels: Kernels, allocator: MemoryAllocator) -> None:
        self.scheme = scheme
        self._call, self._linear = kernels.call, kernels.call.fl_linear
        self._allocator = allocator

    def refuses(self, shape: LinearShape) -> str | None:
        """float16 has no kernels; int8 counts in 32 bits."""
        if getattr(torch, shape.dtype) not in DTYPES:
            return f"the native kernels have no {shape.dtype}"
        if self.scheme == "int8" and shape.in_features > MAX_INT8_INPUTS:
            return f"{shape.in_features} inputs are more than int8 sums hold ({MAX_INT8_INPUTS})"
        return None

    def packed_bytes(self, shape: LinearShape) -> int:
        """Weights, scales and sums, filled up to whole panels. A shared weight is copied: its layout is another."""
        dtype: torch.dtype = getattr(torch, shape.dtype)
        return self._layout(dtype, shape.out_features, shape.in_features, pair=False)[1]

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> PackedLinear:
        """Lays the weight out in panels; "int8" and "int4" quantise it on the way. Keeps none of the tensors."""
        return self._pack(tensors["weight"], None)

    def refuses_fused(self, shape: LinearShape, activation: str | None) -> str | None:
        """In float32 some activations are torch's: where transformers is compared, their last bits count."""
        if shape.dtype == "float32" and activation in _INEXACT:
            return f"torch's {activation} rounds as transformers does"
        return None

    def pack_fused(self, tensors: Mapping[str, torch.Tensor], activation: str) -> PackedLinear:
        """The same layout, but that a gate and its up projection stand panel by panel."""
        return self._pack(tensors["weight"], activation)

    def _pack(self, weight_OI: torch.Tensor, activation: str | None) -> PackedLinear:
        offsets, num_bytes = self._layout_of(weight_OI, activation)
        memory = self._memory(num_bytes)
        layer = self._pack_into(weight_OI, activation, memory, offsets)
        return PackedLinear(layer, memory, offsets, pair=activation in GATED_ACTIVATIONS)

    def _memory(self, num_bytes: int) -> torch.Tensor:
        memory = self._allocator.empty((num_bytes,), torch.uint8, tag="weights")
        self._call.fl_advise_huge_pages(memory.data_ptr(), num_bytes)
        return memory

    def _layout_of(self, weight_OI: torch.Tensor, activation: str | None) -> tuple[Offsets, int]:
        num_outputs, num_inputs = weight_OI.shape
        pair = activation in GATED_ACTIVATIONS
        return self._layout(weight_OI.dtype, num_outputs // 2 if pair else num_outputs, num_inputs, pair=pair)

    def _pack_into(
        self, weight_OI: torch.Tensor, activation: str | None, memory: torch.Tensor, offsets: Offsets
    ) -> LinearLayer:
        """Writes weight, scales and sums to their offsets in the memory; returns the layer's record."""
        pair = activation in GATED_ACTIVATIONS
        num_inputs = weight_OI.shape[1]
        num_outputs = weight_OI.shape[0] // 2 if pair else weight_OI.shape[0]
        if num_inputs > 1 and weight_OI.stride(1) != 1:
            weight_OI = weight_OI.contiguous()
        dtype = DTYPES[weight_OI.dtype]
        base = memory.data_ptr()
        source = (weight_OI.data_ptr(), dtype, weight_OI.stride(0), num_outputs, num_inputs)
        to, scale, sums = (base + offset for offset in offsets)
        if self.scheme == "int8":
            self._call.fl_pack_int8(pair, *source, to, scale, sums)
        elif self.scheme == "int4":
            self._call.fl_pack_int4(pair, *source, to, scale)
        else:
            self._call.fl_pack_float(dtype, pair, *source, to)
        return LinearLayer(
            scheme=self._number(weight_OI.dtype),
            x_dtype=dtype,
            y_dtype=dtype,
            activation=ACTIVATIONS[activation],
            k=num_inputs,
            out=num_outputs,
        )

    def apply(self, x_NI: torch.Tensor, packed: object, bias_O: torch.Tensor | None) -> torch.Tensor:
        """One native call."""
        return self.apply_fused(x_NI, packed, bias_O)

    def apply_fused(
        self,
        x_NI: torch.Tensor,
        packed: object,
        bias_O: torch.Tensor | None,
        residual_NO: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One native call: nothing is rounded between the sum over the inputs and the result."""
        assert isinstance(packed, PackedLinear)
        assert x_NI.dtype == packed.dtype
        num_rows, num_inputs = x_NI.shape
        assert num_inputs == packed.layer.k
        x_stride, inner = x_NI.stride()
        if inner != 1 and num_inputs > 1:
            x_NI = x_NI.contiguous()
            x_stride = num_inputs
        out_NO = torch.empty((num_rows, packed.num_outputs), dtype=packed.dtype)
        bias = residual = None
        residual_stride = 0
        if bias_O is not None:
            assert bias_O.is_contiguous()
            bias = bias_O.data_ptr()
        if residual_NO is not None:
            assert residual_NO.shape == out_NO.shape
            residual_NO = residual_NO if residual_NO.stride(1) == 1 else residual_NO.contiguous()
            residual, residual_stride = residual_NO.data_ptr(), residual_NO.stride(0)
        self._linear(
            packed.address(),
            x_NI.data_ptr(),
            x_stride,
            num_rows,
            bias,
            residual,
            residual_stride,
            out_NO.data_ptr(),
            packed.num_outputs,
        )
        return out_NO

    def refuses_experts(self, enter: LinearShape, leave: LinearShape, spec: MoeSpec) -> str | None:
        """Nothing that the two layers by themselves are not refused for."""
        return self.refuses(enter) or self.refuses(leave)

    def pack_experts(self, tensors: Mapping[str, torch.Tensor], spec: MoeSpec) -> PackedExperts:
        """The layouts of all experts' layers, one behind the other; the second ones give float32, which is summed."""
        weights: list[tuple[torch.Tensor, str | None]] = [(weight, "silu_and_mul") for weight in tensors["gate_up"]]
        weights += [(weight, None) for weight in tensors["down"]]
        layouts = [self._layout_of(weight, activation) for weight, activation in weights]
        memory = self._memory(sum(num_bytes for _, num_bytes in layouts))
        layers, offsets, begin = [], [], 0
        for (weight, activation), ((first, second, third), num_bytes) in zip(weights, layouts, strict=True):
            offsets.append((begin + first, begin + second, begin + third))
            layers.append(self._pack_into(weight, activation, memory, offsets[-1]))
            begin += num_bytes
        for layer in layers[spec.num_experts :]:
            layer.y_dtype = DTYPES[torch.float32]
        return PackedExperts(self._call, spec, memory, layers, offsets)

    def apply_experts(
        self, x_TE: torch.Tensor, logits_TX: torch.Tensor, correction_X: torch.Tensor | None, packed: object
    ) -> torch.Tensor:
        """One native call for routing, products and the sum."""
        assert isinstance(packed, PackedExperts)
        return apply_experts(self._call, x_TE, logits_TX, correction_X, packed)

    def dequantise(self, packed: object) -> torch.Tensor:
        """Undoes the layout with torch; int8 and int4 in float32."""
        assert isinstance(packed, PackedLinear)
        num_inputs, num_outputs = packed.layer.k, packed.num_outputs
        padded = -(-num_inputs // _PAD_K) * _PAD_K
        columns = self._call.fl_packed_columns(packed.pair, num_outputs)
        weight, scale, sums = packed.offsets
        if self.scheme == "int4":
            weight_PI = _int4_numbers(packed.memory[:scale].view(torch.int32), columns, padded)
            scales = packed.memory[scale:sums].view(torch.bfloat16).view(columns // _PANEL, -1, 1, _PANEL)
            per_input = scales.expand(-1, -1, INT4_GROUP, -1).permute(0, 3, 1, 2).reshape(columns, padded)
            weight_PI = weight_PI * per_input.float()
        else:
            dtype = torch.int8 if self.scheme == "int8" else packed.dtype
            elements = packed.memory[weight : weight + columns * padded * dtype.itemsize].view(dtype)
            step = 4 // dtype.itemsize
            weight_PI = elements.view(-1, padded // step, _PANEL, step).transpose(1, 2).reshape(columns, padded)
            if self.scheme == "int8":
                weight_PI = weight_PI * packed.memory[scale : scale + 4 * columns].view(torch.float32)[:, None]
        if packed.pair:
            weight_PI = weight_PI.view(-1, 2, _PANEL, padded).transpose(0, 1).reshape(2, -1, padded)
            return weight_PI[:, :num_outputs, :num_inputs].flatten(0, 1)
        return weight_PI[:num_outputs, :num_inputs]

    def _number(self, dtype: torch.dtype) -> int:
        return {"int8": _INT8, "int4": _INT4}.get(self.scheme, DTYPES[dtype])

    def _layout(self, dtype: torch.dtype, num_outputs: int, num_inputs: int, *, pair: bool) -> tuple[Offsets, int]:
        """Offsets of weight, scales and sums in a layer's memory, and its size, in bytes."""
        weight = self._call.fl_packed_bytes(self._number(dtype), pair, num_outputs, num_inputs)
        columns = self._call.fl_packed_columns(pair, num_outputs)
        padded = -(-num_inputs // _PAD_K) * _PAD_K
        scale = {"int8": 4 * columns, "int4": 2 * columns * (padded // INT4_GROUP)}.get(self.scheme, 0)
        sums = 4 * columns if self.scheme == "int8" else 0
        return (0, weight, weight + scale), weight + scale + sums


def _int4_numbers(words: torch.Tensor, columns: int, padded: int) -> torch.Tensor:
    """-8 to 7 as float32 (columns, padded): input 2 r + j of a word's 8 is in bits 16 j + 4 r to 16 j + 4 r + 3."""
    shifts = torch.tensor([16 * (n % 2) + 4 * (n // 2) for n in range(8)], dtype=torch.int32)
    numbers = ((words.view(-1, padded // 8, _PANEL, 1) >> shifts) & 15) - 8
    return numbers.transpose(1, 2).reshape(columns, padded).float()


def linear_methods(kernels: Kernels, allocator: MemoryAllocator) -> dict[str, tuple[LinearMethod, ...]]:
    """One for each scheme of the contract."""
    return {scheme: (NativeLinear(scheme, kernels, allocator),) for scheme in (UNQUANTIZED, "int8", "int4")}
