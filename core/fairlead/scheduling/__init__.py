"""Decides what each step computes and where its keys and values live. Pure integers: nothing here imports torch."""
