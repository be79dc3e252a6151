"""What changes the logits of a request before they are sampled."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class LogitsProcessor(Protocol):
    """A function of one row of logits; offline `SamplingParams(logits_processors=[...])` takes it as it is.

    Over HTTP a request names it: an installed package registers it under that name as an entry point of the group
    `fairlead.logits_processors`. It runs in the engine's process, on its thread, once per token of each request that
    asks for it, and may run again for the same token after a preemption: equal arguments must give equal logits.
    """

    def __call__(
        self, logits_V: "torch.Tensor", prompt_token_ids: tuple[int, ...], output_token_ids: tuple[int, ...]
    ) -> "torch.Tensor":
        """Returns float32 logits (V,) on the same device. `logits_V` is the call's own and may be changed in place;
        -inf forbids a token. An exception ends this request, and no other."""
        ...
