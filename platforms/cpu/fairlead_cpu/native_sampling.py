"""Op providers on the native kernels: draws, masks and penalties of logits (csrc/sampling.cpp).

Shapes as in `fairlead.ops.reference`.
"""

import torch

from fairlead.interface import OpProvider
from fairlead_cpu.native import Kernels
from fairlead_cpu.native_ops import DTYPES, refuses, rows


class NativeSampling:
    """The ops of one library. A row is read once or twice and never sorted; its token is its own in any batch."""

    def __init__(self, kernels: Kernels) -> None:
        self._draw = kernels.call.fl_draw
        self._draw_filtered = kernels.call.fl_draw_filtered
        self._mask = kernels.call.fl_token_bitmask
        self._penalise = kernels.call.fl_penalties

    def draw(self, probs_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
        """Sums blocks of tokens, then walks through the one that the threshold falls into."""
        probs_RV, uniform_R = rows(probs_RV.float()), uniform_R.double().contiguous()
        num_rows, num_tokens = probs_RV.shape
        tokens_R = torch.empty(num_rows, dtype=torch.int64)
        self._draw(
            probs_RV.data_ptr(),
            probs_RV.stride(0),
            uniform_R.data_ptr(),
            num_rows,
            num_tokens,
            tokens_R.data_ptr(),
        )
        return tokens_R

    def draw_filtered(self, probs_RV: torch.Tensor, settings_4R: torch.Tensor, max_top_k: int) -> torch.Tensor:
        """Sorts only tokens within a factor of the best one, and looks further down where those do not suffice."""
        probs_RV, settings_4R = rows(probs_RV.float()), settings_4R.double().contiguous()
        num_rows, num_tokens = probs_RV.shape
        tokens_R = torch.empty(num_rows, dtype=torch.int64)
        self._draw_filtered(
            probs_RV.data_ptr(),
            probs_RV.stride(0),
            settings_4R.data_ptr(),
            num_rows,
            num_tokens,
            tokens_R.data_ptr(),
        )
        return tokens_R

    def apply_token_bitmask(self, logits_SV: torch.Tensor, bitmask_SW: torch.Tensor) -> torch.Tensor:
        """Copies what is allowed."""
        logits_SV, bitmask_SW = rows(logits_SV), rows(bitmask_SW)
        num_rows, num_tokens = logits_SV.shape
        out_SV = torch.empty((num_rows, num_tokens), dtype=logits_SV.dtype)
        self._mask(
            DTYPES[logits_SV.dtype],
            logits_SV.data_ptr(),
            logits_SV.stride(0),
            bitmask_SW.data_ptr(),
            bitmask_SW.stride(0),
            out_SV.data_ptr(),
            num_rows,
            num_tokens,
        )
        return out_SV

    def apply_penalties(
        self,
        logits_SV: torch.Tensor,
        index_N: torch.Tensor,
        repetition_N: torch.Tensor,
        frequency_N: torch.Tensor,
        presence_N: torch.Tensor,
    ) -> None:
        """The named places alone."""
        assert logits_SV.dtype == torch.float32
        assert logits_SV.is_contiguous()
        index_N = index_N.contiguous()
        penalties = [x.float().contiguous() for x in (repetition_N, frequency_N, presence_N)]
        pointers = (x.data_ptr() for x in (logits_SV, index_N, *penalties))
        self._penalise(*pointers, len(index_N))


def sampling_providers(kernels: Kernels) -> dict[str, OpProvider]:
    """A provider for each op of sampling."""
    ops = NativeSampling(kernels)
    functions = (ops.draw, ops.draw_filtered, ops.apply_token_bitmask, ops.apply_penalties)
    return {fn.__name__: OpProvider(name="native", fn=fn, priority=20, refuses=refuses) for fn in functions}
