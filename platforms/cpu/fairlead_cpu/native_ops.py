"""Op providers on the native kernels: norms, rotary positions, gates, the embedding's rows (csrc/elementwise.cpp).

Shapes as in `fairlead.ops.reference`.
"""

from collections.abc import Callable
from typing import Any

import torch

from fairlead.interface import OpProvider
from fairlead_cpu.native import Kernels

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""The kernels' number of each."""


class NativeOps:
    """The ops of one library. Rows are rounded where the reference rounds them, and summed in one order."""

    def __init__(self, kernels: Kernels) -> None:
        self._rms_norm = kernels.call.fl_rms_norm
        self._layer_norm = kernels.call.fl_layer_norm
        self._rotary = kernels.call.fl_rotary
        self._gate = kernels.call.fl_gate
        self._embedding = kernels.call.fl_embedding

    def embedding(self, token_ids_T: torch.Tensor, weight_VE: torch.Tensor) -> torch.Tensor:
        """Copies rows."""
        weight_VE = weight_VE.contiguous()
        out_TE = torch.empty((len(token_ids_T), weight_VE.shape[1]), dtype=weight_VE.dtype)
        row_bytes = weight_VE.shape[1] * weight_VE.element_size()
        token_ids_T = token_ids_T.contiguous()
        self._embedding(token_ids_T.data_ptr(), len(token_ids_T), weight_VE.data_ptr(), row_bytes, out_TE.data_ptr())
        return out_TE

    def rms_norm(self, x_NE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        """One pass over each row for its sum, one for its result."""
        return self._norm(x_NE, weight_E, eps, gemma=False)

    def gemma_rms_norm(self, x_NE: torch.Tensor, weight_E: torch.Tensor, eps: float) -> torch.Tensor:
        """The same with 1 + weight."""
        return self._norm(x_NE, weight_E, eps, gemma=True)

    def fused_add_rms_norm(
        self, x_NE: torch.Tensor, residual_NE: torch.Tensor, weight_E: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds in the pass that sums."""
        x_NE, residual_NE = rows(x_NE), rows(residual_NE)
        num_rows, size = x_NE.shape
        out_NE = torch.empty((num_rows, size), dtype=x_NE.dtype)
        total_NE = torch.empty((num_rows, size), dtype=x_NE.dtype)
        self._rms_norm(
            DTYPES[x_NE.dtype],
            False,
            x_NE.data_ptr(),
            x_NE.stride(0),
            residual_NE.data_ptr(),
            residual_NE.stride(0),
            weight_E.data_ptr(),
            out_NE.data_ptr(),
            total_NE.data_ptr(),
            num_rows,
            size,
            eps,
        )
        return out_NE, total_NE

    def _norm(self, x_NE: torch.Tensor, weight_E: torch.Tensor, eps: float, *, gemma: bool) -> torch.Tensor:
        x_NE = rows(x_NE)
        num_rows, size = x_NE.shape
        out_NE = torch.empty((num_rows, size), dtype=x_NE.dtype)
        self._rms_norm(
            DTYPES[x_NE.dtype],
            gemma,
            x_NE.data_ptr(),
            x_NE.stride(0),
            None,
            0,
            weight_E.data_ptr(),
            out_NE.data_ptr(),
            None,
            num_rows,
            size,
            eps,
        )
        return out_NE

    def layer_norm(
        self, x_NE: torch.Tensor, weight_E: torch.Tensor, bias_E: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """Mean, variance around it, result: three passes over a row in cache."""
        x_NE = rows(x_NE)
        num_rows, size = x_NE.shape
        out_NE = torch.empty((num_rows, size), dtype=x_NE.dtype)
        self._layer_norm(
            DTYPES[x_NE.dtype],
            x_NE.data_ptr(),
            x_NE.stride(0),
            weight_E.data_ptr(),
            None if bias_E is None else bias_E.data_ptr(),
            out_NE.data_ptr(),
            num_rows,
            size,
            eps,
        )
        return out_NE

    def rotary_embedding(
        self,
        q_THD: torch.Tensor,
        k_TKD: torch.Tensor,
        positions_T: torch.Tensor,
        cos_PD: torch.Tensor,
        sin_PD: torch.Tensor,
        interleaved: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k in one call."""
        q_THD, k_TKD, positions_T = rows(q_THD), rows(k_TKD), positions_T.contiguous()
        num_tokens, num_q, size = q_THD.shape
        num_k = k_TKD.shape[1]
        q_out_THD = torch.empty((num_tokens, num_q, size), dtype=q_THD.dtype)
        k_out_TKD = torch.empty((num_tokens, num_k, size), dtype=k_TKD.dtype)
        self._rotary(
            DTYPES[q_THD.dtype],
            interleaved,
            q_THD.data_ptr(),
            q_THD.stride(0),
            q_THD.stride(1),
            num_q,
            k_TKD.data_ptr(),
            k_TKD.stride(0),
            k_TKD.stride(1),
            num_k,
            positions_T.data_ptr(),
            cos_PD.data_ptr(),
            sin_PD.data_ptr(),
            size,
            num_tokens,
            q_out_THD.data_ptr(),
            k_out_TKD.data_ptr(),
        )
        return q_out_THD, k_out_TKD

    def silu_and_mul(self, x_N2F: torch.Tensor) -> torch.Tensor:
        """In float32, rounded once."""
        return self._gated(x_N2F, gelu=False)

    def gelu_and_mul(self, x_N2F: torch.Tensor) -> torch.Tensor:
        """In float32, rounded once."""
        return self._gated(x_N2F, gelu=True)

    def _gated(self, x_N2F: torch.Tensor, *, gelu: bool) -> torch.Tensor:
        x_N2F = rows(x_N2F)
        num_rows, size = x_N2F.shape[0], x_N2F.shape[1] // 2
        out_NF = torch.empty((num_rows, size), dtype=x_N2F.dtype)
        self._gate(DTYPES[x_N2F.dtype], gelu, x_N2F.data_ptr(), x_N2F.stride(0), out_NF.data_ptr(), num_rows, size)
        return out_NF


def rows(x: torch.Tensor) -> torch.Tensor:
    """x itself if its last dimension has no gaps, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def refuses(dtype: str) -> str | None:
    """Why a dtype cannot be served."""
    return None if getattr(torch, dtype) in DTYPES else f"the native kernels have no {dtype}"


# A norm's last bit moves the logits of tiny models by 1.5e-4, and N1 compares those with transformers' at 1e-4. The
# kernel is nearer to the exact norm than torch's (6e-7 against 1.1e-6), but in float32 it is the roundings that count.
_RMS_NORMS = ("rms_norm", "fused_add_rms_norm")


def _refuses_norm(dtype: str) -> str | None:
    return "torch's norm rounds as transformers does" if dtype == "float32" else refuses(dtype)


def native_providers(kernels: Kernels) -> dict[str, OpProvider]:
    """A provider for each op that has a kernel."""
    ops = NativeOps(kernels)
    functions: dict[str, Callable[..., Any]] = {
        "embedding": ops.embedding,
        "rms_norm": ops.rms_norm,
        "fused_add_rms_norm": ops.fused_add_rms_norm,
        "gemma_rms_norm": ops.gemma_rms_norm,
        "layer_norm": ops.layer_norm,
        "rotary_embedding": ops.rotary_embedding,
        "silu_and_mul": ops.silu_and_mul,
        "gelu_and_mul": ops.gelu_and_mul,
    }
    return {
        name: OpProvider(name="native", fn=fn, priority=20, refuses=_refuses_norm if name in _RMS_NORMS else refuses)
        for name, fn in functions.items()
    }
