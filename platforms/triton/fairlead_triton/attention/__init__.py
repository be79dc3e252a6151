"""Paged attention on Triton: `backend.TritonAttention` is what a platform makes.

Importing this package imports neither torch nor Triton.
"""
