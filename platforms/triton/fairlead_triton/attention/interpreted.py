"""Two things that Triton's interpreter cannot do as compiled code does, each under one name for both."""

from typing import Any

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    def bound(x: Any) -> int:
        """A bound of a loop: here numbers are arrays of one entry, which NumPy from 2.4 on takes for no index."""
        return int(x.handle.data.item()) if isinstance(x, tl.tensor) else int(x)

    def dot(a: Any, b: Any, acc: Any) -> Any:
        """acc + a b; here the bits of bfloat16 would be multiplied as integers."""
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)

else:

    @triton.jit
    def bound(x):  # type: ignore[no-untyped-def]
        """A bound of a loop."""
        return x

    @triton.jit
    def dot(a, b, acc):  # type: ignore[no-untyped-def]
        """acc + a b, float32 without shortened mantissas."""
        return tl.dot(a, b, acc, input_precision="ieee")
