"""Structured output: a grammar per request, compiled before admission, that masks the logits of every step."""
