"""The meaning of each scheme of linear weights, and the choice of who serves it.

Shapes: N rows, I input features, O output features, G groups of input features; T tokens, E model width, F width of an
expert, X experts.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from fairlead.contract import check_packed
from fairlead.errors import ConfigError, PluginContractError
from fairlead.interface import (
    GATED_ACTIVATIONS,
    UNQUANTIZED,
    ExpertsMethod,
    FusedLinearMethod,
    LinearMethod,
    LinearShape,
    MemoryAllocator,
    MoeSpec,
)
from fairlead.ops.first_call import FirstCall

Packed = object
LinearOp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

TOLERANCE: dict[str, dict[str, float]] = {
    UNQUANTIZED: {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
    "int8": {"float32": 2e-2, "bfloat16": 3e-2, "float16": 2e-2},
    "int4": {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
    "fp8": {"float32": 4e-2, "bfloat16": 5e-2, "float16": 4e-2},
}
"""Largest error of `apply` by scheme and dtype, against the dequantised weight in float32: the Frobenius norm of the
difference over that of the result. Those of int8 and fp8 are what rounding the rows to 8 bits costs."""

INT4_GROUP = 128

ADD_NORM = "fused_add_rms_norm"
"""The op whose sum a linear method may take over: a provider of it that was asked for by name keeps it."""


class PlainLinear:
    """The reference of "unquantized": the weight as it was loaded, through the op `linear`."""

    def __init__(self, linear: LinearOp, name: str = "reference") -> None:
        self.name, self._linear = name, linear

    def refuses(self, shape: LinearShape) -> str | None:
        """Never."""
        return None

    def packed_bytes(self, shape: LinearShape) -> int:
        """The weight's own bytes."""
        return 0 if shape.is_shared else _num_elements(shape) * _itemsize(shape)

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """Keeps the weight."""
        return tensors["weight"]

    def apply(self, x_NI: torch.Tensor, packed: Packed, bias_O: torch.Tensor | None) -> torch.Tensor:
        """One call of the op."""
        assert isinstance(packed, torch.Tensor)
        return self._linear(x_NI, packed, bias_O)

    def dequantise(self, packed: Packed) -> torch.Tensor:
        """The weight itself."""
        assert isinstance(packed, torch.Tensor)
        return packed


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """Integers (O, G, I / G) in int8 and their scales (O, G, 1) in float32; the last group may be filled with zeros."""

    values: torch.Tensor
    scales: torch.Tensor
    in_features: int

    @classmethod
    def of(
        cls, weight_OI: torch.Tensor, *, group_size: int, max_value: int, allocator: MemoryAllocator | None
    ) -> "QuantizedWeight":
        """Symmetric rounding to -max_value … max_value, by output and group of inputs. It stays in the pool "weights"
        of the allocator, if there is one."""
        num_inputs = weight_OI.shape[1]
        padded = functional.pad(weight_OI.float(), (0, -num_inputs % group_size))
        grouped = padded.view(len(padded), -1, group_size)
        scales = grouped.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / max_value
        values = (grouped / scales).round_().to(torch.int8)
        if allocator is not None:
            values, scales = (
                allocator.empty(tuple(t.shape), t.dtype, tag="weights").copy_(t) for t in (values, scales)
            )
        return cls(values=values, scales=scales, in_features=num_inputs)

    def dequantised(self) -> torch.Tensor:
        """(O, I) in float32."""
        return (self.values * self.scales).flatten(1)[:, : self.in_features]


class Int8Linear:
    """The reference of "int8": weights rounded by output channel, rows by token, both symmetric; products exact.

    Source: Dettmers et al., "LLM.int8()" (2022), section 2.1 (vector-wise quantisation).
    """

    name = "reference"

    def __init__(self, allocator: MemoryAllocator | None = None) -> None:
        self._allocator = allocator

    def refuses(self, shape: LinearShape) -> str | None:
        """Never."""
        return None

    def packed_bytes(self, shape: LinearShape) -> int:
        """One byte a weight, and a scale an output."""
        return _num_elements(shape) + 4 * shape.out_features

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """One group: a whole row of the weight."""
        weight_OI = tensors["weight"]
        group_size = weight_OI.shape[1]
        return QuantizedWeight.of(weight_OI, group_size=group_size, max_value=127, allocator=self._allocator)

    def apply(self, x_NI: torch.Tensor, packed: Packed, bias_O: torch.Tensor | None) -> torch.Tensor:
        """Rounds each row by its own largest value, multiplies, scales back."""
        assert isinstance(packed, QuantizedWeight)
        x32 = x_NI.float()
        scale_N1 = x32.abs().amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / 127
        products_NO = (x32 / scale_N1).round_() @ packed.values.flatten(1).float().t()
        out_NO = products_NO * scale_N1 * packed.scales.flatten()
        return (out_NO if bias_O is None else out_NO + bias_O.float()).to(x_NI.dtype)

    def dequantise(self, packed: Packed) -> torch.Tensor:
        """In float32."""
        assert isinstance(packed, QuantizedWeight)
        return packed.dequantised()


class Int4Linear:
    """The reference of "int4": weights alone are rounded, symmetrically, in groups of INT4_GROUP inputs.

    The integers stand one in a byte: this is what the scheme means, not how to save memory.
    """

    name = "reference"

    def __init__(self, allocator: MemoryAllocator | None = None) -> None:
        self._allocator = allocator

    def refuses(self, shape: LinearShape) -> str | None:
        """Never."""
        return None

    def packed_bytes(self, shape: LinearShape) -> int:
        """One byte a weight, and a scale a group."""
        groups = -(-shape.in_features // INT4_GROUP)
        return shape.out_features * groups * (INT4_GROUP + 4)

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """Rounds to -7 … 7."""
        weight_OI = tensors["weight"]
        return QuantizedWeight.of(weight_OI, group_size=INT4_GROUP, max_value=7, allocator=self._allocator)

    def apply(self, x_NI: torch.Tensor, packed: Packed, bias_O: torch.Tensor | None) -> torch.Tensor:
        """Multiplies by the dequantised weight, in float32."""
        assert isinstance(packed, QuantizedWeight)
        bias32_O = None if bias_O is None else bias_O.float()
        return functional.linear(x_NI.float(), packed.dequantised(), bias32_O).to(x_NI.dtype)

    def dequantise(self, packed: Packed) -> torch.Tensor:
        """In float32."""
        assert isinstance(packed, QuantizedWeight)
        return packed.dequantised()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Weight:
    """8-bit floats (O, I), and their scales (O,) in float32."""

    values: torch.Tensor
    scales: torch.Tensor


class Fp8Linear:
    """The reference of "fp8": weights rounded to 8-bit floats by output channel, rows by token; the sum in float32.

    A device whose 8-bit floats are of another kind than the open standard's E4M3 rounds to its own.
    Source: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), sections 3 and 4.
    """

    name = "reference"

    def __init__(self, allocator: MemoryAllocator | None = None) -> None:
        self._allocator = allocator

    def refuses(self, shape: LinearShape) -> str | None:
        """Never."""
        return None

    def packed_bytes(self, shape: LinearShape) -> int:
        """One byte a weight, and a scale an output."""
        return _num_elements(shape) + 4 * shape.out_features

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """The largest of a row of the weight becomes the largest float."""
        values, scales_O1 = _round_to_fp8(tensors["weight"].float())
        scales = scales_O1.flatten()
        if self._allocator is not None:
            values, scales = (
                self._allocator.empty(tuple(t.shape), t.dtype, tag="weights").copy_(t) for t in (values, scales)
            )
        return Fp8Weight(values=values, scales=scales)

    def apply(self, x_NI: torch.Tensor, packed: Packed, bias_O: torch.Tensor | None) -> torch.Tensor:
        """Rounds each row by its own largest value, multiplies, scales back."""
        assert isinstance(packed, Fp8Weight)
        values, scale_N1 = _round_to_fp8(x_NI.float())
        out_NO = (values.float() @ packed.values.float().t()) * scale_N1 * packed.scales
        return (out_NO if bias_O is None else out_NO + bias_O.float()).to(x_NI.dtype)

    def dequantise(self, packed: Packed) -> torch.Tensor:
        """In float32."""
        assert isinstance(packed, Fp8Weight)
        return packed.values.float() * packed.scales[:, None]


def _round_to_fp8(x_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 values, and the scales (N, 1) that give x again."""
    dtype = torch.float8_e4m3fn
    largest = torch.finfo(dtype).max
    scales_N1 = (x_NI.abs().amax(-1, keepdim=True) / largest).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x_NI / scales_N1).clamp_(-largest, largest).to(dtype), scales_N1


def _num_elements(shape: LinearShape) -> int:
    return shape.in_features * shape.out_features


def _itemsize(shape: LinearShape) -> int:
    dtype: torch.dtype = getattr(torch, shape.dtype)
    return dtype.itemsize


class LinearTable:
    """Who serves which scheme; made once per engine, asked once per layer.

    `chosen` collects what was chosen: names by scheme, in order of first use. `fused` does so for ops that linear
    methods do in their own pass, by op; those of `kept` they leave alone.
    """

    def __init__(
        self,
        platform: str,
        methods: Mapping[str, tuple[LinearMethod, ...]],
        linear: LinearOp,
        *,
        linear_name: str = "reference",
        wanted: str | None = None,
        allocator: MemoryAllocator | None = None,
        kept: Collection[str] = (),
    ) -> None:
        """`linear` is the op that serves unquantised layers where no method does; `wanted` the name that was asked for;
        the references of quantised schemes take their memory from the allocator.

        Raises PluginContractError if the platform brings a scheme that the contract does not have, and ConfigError if
        nothing is called as was wanted.
        """
        references: dict[str, LinearMethod] = {
            UNQUANTIZED: PlainLinear(linear, linear_name),
            "int8": Int8Linear(allocator),
            "int4": Int4Linear(allocator),
            "fp8": Fp8Linear(allocator),
        }
        for scheme in methods:
            if scheme not in references:
                raise PluginContractError(
                    plugin=platform,
                    hook="linear_methods",
                    expected=f"schemes among {', '.join(references)}",
                    got=repr(scheme),
                )
        self.platform = platform
        self._methods = {scheme: (*methods.get(scheme, ()), own) for scheme, own in references.items()}
        self._wanted = wanted
        self._kept = kept
        self.chosen: dict[str, tuple[str, ...]] = {}
        self.fused: dict[str, tuple[str, ...]] = {}

    @property
    def schemes(self) -> tuple[str, ...]:
        """Every scheme that there is."""
        return tuple(self._methods)

    def choose(self, scheme: str, shape: LinearShape) -> LinearMethod:
        """The first method that does not refuse; raises ConfigError if the one that was asked for does."""
        candidates = self._methods[scheme]
        asked = [m for m in candidates if m.name == self._wanted]
        for method in asked or candidates:
            reason = method.refuses(shape)
            if reason is None:
                _note(self.chosen, scheme, method.name)
                return method
            if asked:
                raise ConfigError(f"provider {method.name!r} of op 'linear' cannot be used: {reason}")
        raise AssertionError("the reference refuses nothing")

    def fuses(self, method: LinearMethod, shape: LinearShape, activation: str | None) -> bool:
        """Whether the method does the activation (None: the sum with a residual) in the pass that multiplies."""
        op = ADD_NORM if activation is None else activation
        if op in self._kept or not isinstance(method, FusedLinearMethod):
            return False
        if method.refuses_fused(shape, activation) is not None:
            return False
        _note(self.fused, op, method.name)
        return True

    def pack(self, method: LinearMethod, weight_OI: torch.Tensor, activation: str | None = None) -> Packed:
        """What the method makes of a weight, for an activation that it `fuses`; raises PluginContractError if it makes
        nothing."""
        if activation is None:
            packed = method.pack({"weight": weight_OI})
        else:
            assert isinstance(method, FusedLinearMethod)
            packed = method.pack_fused({"weight": weight_OI}, activation)
        check_packed(self.platform, method, packed)
        return packed

    def experts_of(
        self, method: LinearMethod, enter: LinearShape, leave: LinearShape, spec: MoeSpec
    ) -> Callable[..., torch.Tensor] | None:
        """The method's `apply_experts`, its first result checked, or None where it has none for these."""
        if "moe" in self._kept or not isinstance(method, ExpertsMethod):
            return None
        if method.refuses_experts(enter, leave, spec) is not None:
            return None
        _note(self.fused, "moe", method.name)

        def reference(x_TE: torch.Tensor, *_: object) -> torch.Tensor:
            return torch.empty_like(x_TE)

        hook = f"linear_methods {method.name!r}.apply_experts"
        return FirstCall(method.apply_experts, reference, plugin=self.platform, hook=hook)

    def pack_experts(
        self, method: LinearMethod, gate_up_X2FE: torch.Tensor, down_XEF: torch.Tensor, spec: MoeSpec
    ) -> Packed:
        """What the method makes of all experts; raises PluginContractError if it makes nothing."""
        assert isinstance(method, ExpertsMethod)
        packed = method.pack_experts({"gate_up": gate_up_X2FE, "down": down_XEF}, spec)
        check_packed(self.platform, method, packed)
        return packed

    def apply_of(
        self, method: LinearMethod, shape: LinearShape, activation: str | None = None, *, adds: bool = False
    ) -> Callable[..., torch.Tensor]:
        """The method's `apply`, or `apply_fused` for an activation or a residual, its first result checked."""
        num_outputs = shape.out_features // 2 if activation in GATED_ACTIVATIONS else shape.out_features

        def reference(x_NI: torch.Tensor, *_: object) -> torch.Tensor:
            return x_NI.new_empty((*x_NI.shape[:-1], num_outputs))

        apply, hook = method.apply, f"linear_methods {method.name!r}.apply"
        if activation is not None or adds:
            assert isinstance(method, FusedLinearMethod)
            apply, hook = method.apply_fused, f"{hook}_fused"
        return FirstCall(apply, reference, plugin=self.platform, hook=hook)


def _note(names: dict[str, tuple[str, ...]], key: str, name: str) -> None:
    known = names.get(key, ())
    names[key] = known if name in known else (*known, name)
