"""What the callers of kernels share: how rows lie, and sizes of blocks."""

import torch


def power_of_two(size: int) -> int:
    """The least one that is not below `size`."""
    return 1 << max(size - 1, 0).bit_length()


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int, int]:
    """(x, rows, inner, outer stride, inner stride) of a tensor of any number of leading dimensions.

    Row r starts at (r // inner) * outer + (r % inner) * inner stride. Views of one or two leading dimensions are taken
    as they lie; others, and those whose rows are not contiguous, are copied.
    """
    width = x.shape[-1]
    if x.dim() > 3 or (x.stride(-1) != 1 and width > 1):
        x = x.reshape(-1, width).contiguous()
    if x.dim() == 2:
        return x, x.shape[0], 1, x.stride(0), 0
    if x.dim() == 3:
        return x, x.shape[0] * x.shape[1], max(x.shape[1], 1), x.stride(0), x.stride(1)
    return x, 1, 1, 0, 0
