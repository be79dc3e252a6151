"""Benchmarks of an accelerator against its own measured ceilings, and against transformers on the same card."""
