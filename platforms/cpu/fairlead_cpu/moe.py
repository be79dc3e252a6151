"""Experts of a mixture by the native kernels: one call routes, multiplies and sums (csrc/moe.cpp).

Shapes: T tokens, E model width, F width of an expert, X experts.
"""

import ctypes
from types import SimpleNamespace

import torch

from fairlead.interface import MoeSpec
from fairlead_cpu.native import LinearLayer, MoeLayer, Offsets

_LINE, _NUM_PARTS = 64, 8  # of scratch memory


class PackedExperts:
    """All experts' weights in one tensor, and the records that the kernels read.

    The tensor's memory may move while the engine sleeps, so the records' pointers are checked at every call.
    """

    __slots__ = (
        "_base",
        "_fixed",
        "_layers",
        "_offsets",
        "_per_token",
        "_record",
        "address",
        "dtype",
        "memory",
        "num_inputs",
    )

    def __init__(
        self,
        call: SimpleNamespace,
        spec: MoeSpec,
        memory: torch.Tensor,
        layers: list[LinearLayer],
        offsets: list[Offsets],
    ) -> None:
        """First every expert's first layer, then every second one; offsets are from the memory's begin."""
        self.memory, self._offsets = memory, offsets
        self._layers = (LinearLayer * len(layers))(*layers)
        first = ctypes.addressof(self._layers)
        self._record = MoeLayer(
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            num_groups=spec.num_groups,
            top_groups=spec.top_groups,
            group_top=spec.group_top,
            sigmoid=spec.scoring == "sigmoid",
            normalize=spec.normalize,
            scale=spec.scale,
            enter=first,
            leave=first + spec.num_experts * ctypes.sizeof(LinearLayer),
        )
        self.address = ctypes.addressof(self._record)
        self.num_inputs: int = layers[0].k
        self.dtype = torch.bfloat16 if layers[0].x_dtype else torch.float32
        self._base = 0
        # Asked for now, since a recorded step is calls that compute and no others. Parts are of whole lines of 64
        # bytes, so that 64 tokens tell what one takes, and other numbers waste less than a line of each part.
        empty: int = call.fl_moe_scratch_bytes(self.address, 0)
        self._fixed = empty + _NUM_PARTS * _LINE
        self._per_token: int = (call.fl_moe_scratch_bytes(self.address, _LINE) - empty) // _LINE

    def scratch_bytes(self, num_tokens: int) -> int:
        """Memory that a call needs beside its result."""
        return self._fixed + num_tokens * self._per_token

    def check_pointers(self) -> None:
        """Makes the records' pointers valid now."""
        base = self.memory.data_ptr()
        if base == self._base:
            return
        self._base = base
        for layer, offsets in zip(self._layers, self._offsets, strict=True):
            layer.weight, layer.scale, layer.sums = (base + offset for offset in offsets)


def apply_experts(
    call: SimpleNamespace,
    x_TE: torch.Tensor,
    logits_TX: torch.Tensor,
    correction_X: torch.Tensor | None,
    packed: PackedExperts,
) -> torch.Tensor:
    """One native call."""
    assert x_TE.dtype == packed.dtype
    assert x_TE.shape[1] == packed.num_inputs
    assert logits_TX.dtype in (torch.float32, packed.dtype)
    assert correction_X is None or (correction_X.dtype == torch.float32 and correction_X.is_contiguous())
    x_TE, logits_TX = (t if t.stride(1) == 1 else t.contiguous() for t in (x_TE, logits_TX))
    packed.check_pointers()
    num_tokens = len(x_TE)
    scratch = torch.empty((packed.scratch_bytes(num_tokens),), dtype=torch.uint8)
    out_TE = torch.empty((num_tokens, packed.num_inputs), dtype=packed.dtype)
    call.fl_moe(
        packed.address,
        x_TE.data_ptr(),
        x_TE.stride(0),
        num_tokens,
        logits_TX.dtype == torch.bfloat16,
        logits_TX.data_ptr(),
        logits_TX.stride(0),
        None if correction_X is None else correction_X.data_ptr(),
        scratch.data_ptr(),
        out_TE.data_ptr(),
    )
    return out_TE
