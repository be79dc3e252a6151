"""Engines side by side on the same requests; compare.py drives it. Workers run in each engine's own environment."""
