"""What Triton's interpreter must be helped with; compiled, these are the operations themselves."""

import triton
import triton.language as tl

if triton.knobs.runtime.interpret:

    def bound(x):
        """A bound of a loop: numbers are arrays of one entry here, which NumPy from 2.4 on does not take for one."""
        return int(x.handle.data.item()) if isinstance(x, tl.tensor) else int(x)

    def dot(a, b, acc):
        """acc + a b: the bits of bfloat16 would be multiplied as integers here, so it is widened."""
        if a.dtype == tl.bfloat16:
            a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)

else:

    @triton.jit
    def bound(x):
        """A bound of a loop."""
        return x

    @triton.jit
    def dot(a, b, acc):
        """acc + a b; float32 keeps all of its mantissa."""
        return tl.dot(a, b, acc, input_precision="ieee")
