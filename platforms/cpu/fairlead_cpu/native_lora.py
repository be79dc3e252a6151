"""Op providers on the native kernels: low-rank adapters, each row by its own (csrc/lora.cpp).

Shapes as in `fairlead.ops.reference`.
"""

import torch

from fairlead.interface import OpProvider
from fairlead_cpu.native import Kernels
from fairlead_cpu.native_ops import DTYPES, refuses, rows


class NativeLora:
    """The ops of one library. A matrix is read where it lies, in place of a copy for each row."""

    def __init__(self, kernels: Kernels) -> None:
        self._shrink = kernels.call.fl_lora_shrink
        self._expand = kernels.call.fl_lora_expand

    def lora_shrink(self, x_NI: torch.Tensor, a_LRI: torch.Tensor, adapter_N: torch.Tensor) -> torch.Tensor:
        """Rows of adapter 0 are zeros without a product."""
        x_NI, a_LRI, adapter_N = rows(x_NI), a_LRI.to(x_NI.dtype).contiguous(), adapter_N.contiguous()
        num_rows, size = x_NI.shape
        rank = a_LRI.shape[1]
        out_NR = torch.empty((num_rows, rank), dtype=torch.float32)
        self._shrink(
            DTYPES[x_NI.dtype],
            x_NI.data_ptr(),
            x_NI.stride(0),
            a_LRI.data_ptr(),
            adapter_N.data_ptr(),
            out_NR.data_ptr(),
            num_rows,
            rank,
            size,
        )
        return out_NR

    def lora_expand(
        self, y_NO: torch.Tensor, h_NR: torch.Tensor, b_LOR: torch.Tensor, adapter_N: torch.Tensor
    ) -> torch.Tensor:
        """Rows of adapter 0 are copied."""
        y_NO, h_NR, adapter_N = rows(y_NO), rows(h_NR.float()), adapter_N.contiguous()
        b_LOR = b_LOR.to(y_NO.dtype).contiguous()
        num_rows, size = y_NO.shape
        out_NO = torch.empty((num_rows, size), dtype=y_NO.dtype)
        self._expand(
            DTYPES[y_NO.dtype],
            y_NO.data_ptr(),
            y_NO.stride(0),
            h_NR.data_ptr(),
            h_NR.stride(0),
            b_LOR.data_ptr(),
            adapter_N.data_ptr(),
            out_NO.data_ptr(),
            num_rows,
            size,
            h_NR.shape[1],
        )
        return out_NO


def lora_providers(kernels: Kernels) -> dict[str, OpProvider]:
    """A provider for both ops."""
    ops = NativeLora(kernels)
    functions = (ops.lora_shrink, ops.lora_expand)
    return {fn.__name__: OpProvider(name="native", fn=fn, priority=20, refuses=refuses) for fn in functions}
