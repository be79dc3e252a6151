"""What Triton's interpreter cannot do as compiled code does, under one name for both.

There, a call of a jitted function from a kernel wraps all of triton.language anew and never unwraps it: a kernel of
some hundred such calls takes minutes. So functions of kernels are plain Python to it, reductions included.
"""

from typing import Any

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    def device_function(fn: Any) -> Any:
        """A function that kernels call."""
        return fn

    def bound(x: Any) -> int:
        """A bound of a loop: here numbers are arrays of one entry, which NumPy from 2.4 on takes for no index."""
        return int(x.handle.data.item()) if isinstance(x, tl.tensor) else int(x)

    def dot(a: Any, b: Any, acc: Any) -> Any:
        """acc + a b; here the bits of bfloat16 would be multiplied as integers, so what is no integer is widened."""
        if a.dtype.is_floating():
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)

    def largest_of(x: Any, axis: int) -> Any:
        """The maximum along an axis."""
        return tl.reduce(x, axis, tl.standard._elementwise_max)

    def sum_of(x: Any, axis: int) -> Any:
        """The sum along an axis."""
        return tl.reduce(x, axis, tl.standard._sum_combine)

else:
    device_function = triton.jit

    @triton.jit
    def bound(x):  # type: ignore[no-untyped-def]
        """A bound of a loop."""
        return x

    @triton.jit
    def dot(a, b, acc):  # type: ignore[no-untyped-def]
        """acc + a b, float32 without shortened mantissas."""
        return tl.dot(a, b, acc, input_precision="ieee")

    @triton.jit
    def largest_of(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
        """The maximum along an axis."""
        return tl.max(x, axis)

    @triton.jit
    def sum_of(x, axis: tl.constexpr):  # type: ignore[no-untyped-def]
        """The sum along an axis."""
        return tl.sum(x, axis)
