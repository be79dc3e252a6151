"""Ways to run the forward pass that need nothing of the device."""

from collections.abc import Callable

import torch

Forward = Callable[..., torch.Tensor]


class PassThrough:
    """The reference of GraphRunner: every step as it comes."""

    buckets: tuple[int, ...] = ()

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        """No padding."""
        return None

    def run(self, forward: Forward, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: object) -> torch.Tensor:
        """Calls it."""
        return forward(token_ids_T, positions_T, step)


def smallest_bucket(buckets: tuple[int, ...], num_tokens: int) -> int | None:
    """The first of the rising buckets that holds so many rows; None if none does."""
    return next((size for size in buckets if size >= num_tokens), None)
