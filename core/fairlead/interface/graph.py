"""How the model's forward pass is run: as it comes, or captured once and replayed.

Shapes: T packed tokens of a step (padding included), E model width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    Forward = Callable[..., torch.Tensor]


class GraphRunner(Protocol):
    """Runs the forward pass of every step; one per engine. The reference passes each call through.

    `buckets` are the numbers of rows, rising, that the engine runs once each while it starts, so that they can be
    captured or compiled before the first request; empty if there is nothing to prepare. Padding is ordinary work: the
    core appends sequences that live in a block of their own, which the cache has only where there are buckets.
    """

    buckets: tuple[int, ...]

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        """The number of rows that a step of `num_tokens` is padded to, or None to run it as it is.

        `max_query_len` is 1 for a step of decodes alone. What is returned is at least `num_tokens` and in `buckets`.
        A device that knows static shapes only returns a bucket for every step that its Capabilities permit. The rows
        whose logits are wanted are padded by the same rule, as decodes.
        """
        ...

    def run(
        self, forward: "Forward", token_ids_T: "torch.Tensor", positions_T: "torch.Tensor", step: object
    ) -> "torch.Tensor":
        """Returns `forward(token_ids_T, positions_T, step)`, hidden states (T, E), however they come about.

        To replay, copy the two int64 inputs to where the capture read them; `step` holds the plans that the
        platform's attention backends made for this step, which must refill what a capture of this T reads. Its KV
        caches are the same in all calls: steps on other caches, such as those that measure memory while an engine is
        built, never come here. The result is read before the next call, which may reuse its memory. The plans of the
        next step may be made before this one has run.
        """
        ...
