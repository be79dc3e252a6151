"""The requests, identical for every engine: token ids from fixed seeds, output lengths forced. NumPy alone.

W1: 64 requests, prompts of 64 to 192 tokens, outputs of 32 to 96. W2: one stream, 128 in, 128 out. W3: one prompt of
2048, one token out. W4: 32 requests that share 1024 tokens, 32 of their own, 32 out.
"""

from collections.abc import Callable

import numpy as np

Request = tuple[list[int], int]
"""Prompt and number of tokens to generate."""

NAMES = ("w1", "w2", "w3", "w4")
METRICS = {
    "w1": ("output_tokens_per_s",),
    "w2": ("ttft_ms", "itl_ms"),
    "w3": ("prefill_tokens_per_s",),
    "w4": ("wall_s",),
}
LOWER_IS_BETTER = ("ttft_ms", "itl_ms", "wall_s")
VOCAB_SIZES = {"smol135m": 49_152, "qwen05b": 151_936, "llama1b": 128_256, "tiny": 1024}


def requests(workload: str, model: str, repetition: int) -> list[Request]:
    """Of one run. Each repetition has prompts of its own, so that no cache of an engine knows them; lengths stay."""
    vocab_size, is_tiny = VOCAB_SIZES[model], model == "tiny"
    make: dict[str, Callable[[], list[Request]]] = {
        "w1": lambda: _mixed(vocab_size, 1000 + repetition, *((6, 8) if is_tiny else (64, 1))),
        "w2": lambda: [_one(vocab_size, 2000 + repetition, *((16, 8) if is_tiny else (128, 128)))],
        "w3": lambda: [_one(vocab_size, 3000 + repetition, 96 if is_tiny else 2048, 1)],
        "w4": lambda: _shared(vocab_size, 4000 + repetition, *((4, 32, 4, 4) if is_tiny else (32, 1024, 32, 32))),
    }
    return make[workload]()


def _ids(draw: np.random.Generator, num: int, vocab_size: int) -> list[int]:
    found: list[int] = draw.integers(300, vocab_size - 100, size=num).tolist()
    return found


def _mixed(vocab_size: int, seed: int, num: int, divisor: int) -> list[Request]:
    draw = np.random.default_rng(1)
    lens_in, lens_out = draw.integers(64, 193, size=num) // divisor, draw.integers(32, 97, size=num) // divisor
    draw = np.random.default_rng(seed)
    return [(_ids(draw, int(i), vocab_size), int(o)) for i, o in zip(lens_in, lens_out, strict=True)]


def _one(vocab_size: int, seed: int, num_in: int, num_out: int) -> Request:
    return _ids(np.random.default_rng(seed), num_in, vocab_size), num_out


def _shared(vocab_size: int, seed: int, num: int, num_shared: int, num_own: int, num_out: int) -> list[Request]:
    draw = np.random.default_rng(seed)
    prefix = _ids(draw, num_shared, vocab_size)
    return [(prefix + _ids(draw, num_own, vocab_size), num_out) for _ in range(num)]


def metrics(workload: str, asked: list[Request], seconds: float, token_times: list[float]) -> dict[str, float]:
    """What a run gave: its seconds, and for W2 when each token came, by seconds from the request on."""
    if workload == "w2":
        gaps = len(token_times) - 1
        return {"ttft_ms": 1e3 * token_times[0], "itl_ms": 1e3 * (token_times[-1] - token_times[0]) / gaps}
    if workload == "w3":
        return {"prefill_tokens_per_s": sum(len(prompt) for prompt, _ in asked) / seconds}
    if workload == "w4":
        return {"wall_s": seconds}
    return {"output_tokens_per_s": sum(num_out for _, num_out in asked) / seconds}
