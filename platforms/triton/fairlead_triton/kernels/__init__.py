"""Device code: functions that Triton compiles. What calls them is one level up, in modules of the same names.

Nothing here has Python's types: Triton's language is not Python. Pointers come first, then sizes and strides in
elements, then compile-time constants in capitals. Sizes that change with the batch are not specialised, or serving
would stop to compile for each batch of 1 and of 16. Rows start at 64-bit offsets, so no tensor is too large.
"""
