"""Step 1: what the card can do at most, by large operations through torch."""

from collections.abc import Callable, Iterator

import torch

from gpubench.harness import Card, Case, Settings

GROUPS = ("card",)


def cases(settings: Settings, group: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Copy bandwidth and the rates of matrix products."""
    card = Card(settings)
    yield "copy", lambda: {"bytes_per_s": card.copy_bytes_per_s}
    yield f"matmul {settings.dtype}", lambda: {"ops_per_s": card.matmul_ops_per_s}
    yield "matmul float8", lambda: matmul_float8(card)
    yield "matmul int8", lambda: matmul_int8(card)


def matmul_float8(card: Card) -> Case:
    """Through torch's scaled matmul, one scale a tensor; skipped where torch has none for this device."""
    size = card.settings.pick(8192, 128)
    one = torch.ones((), device=card.device)
    a, b = (card.randn(size, size).to(torch.float8_e4m3fn) for _ in range(2))

    def multiply(i: int) -> object:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return _rate(card, multiply, size)


def matmul_int8(card: Card) -> Case:
    """Exact products of integers."""
    size = card.settings.pick(8192, 128)
    a, b = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=card.device) for _ in range(2))
    return _rate(card, lambda i: torch._int_mm(a, b.t()), size)


def _rate(card: Card, multiply: Callable[[int], object], size: int) -> Case:
    try:
        multiply(0)
    except (RuntimeError, NotImplementedError) as error:
        return {"skipped": f"torch cannot do it here: {str(error).splitlines()[0][:120]}"}
    return {"ops_per_s": 2 * size**3 / card.time(multiply, is_graphed=False).median_s}
