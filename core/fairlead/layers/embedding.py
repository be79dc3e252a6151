"""Token embedding and the output head."""

import torch

from fairlead.layers.context import BuildContext
from fairlead.layers.linear import Linear


class Embedding(torch.nn.Module):
    """Token ids (T,) to vectors (T, E), times `scale` (rounded to the weights' dtype)."""

    def __init__(self, vocab_size: int, size: int, ctx: BuildContext, *, scale: float = 1.0) -> None:
        super().__init__()
        self._embedding = ctx.ops.embedding
        self._scale = torch.tensor(scale, dtype=ctx.dtype).item()
        self.weight = ctx.weight(vocab_size, size)

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        x_TE = self._embedding(token_ids_T, self.weight)
        return x_TE if self._scale == 1 else x_TE * self._scale


class OutputHead(Linear):
    """Hidden states (S, E) to logits (S, V) in float32; shares the embedding's weight where `tied_to` is given.

    It is never quantised: what it rounds off decides between tokens. `soft_cap` c turns a logit l into c * tanh(l / c).
    """

    def __init__(
        self,
        vocab_size: int,
        size: int,
        ctx: BuildContext,
        *,
        tied_to: Embedding | None = None,
        bias: bool = False,
        soft_cap: float | None = None,
    ) -> None:
        weight = None if tied_to is None else tied_to.weight
        super().__init__(size, vocab_size, ctx, bias=bias, is_quantized=False, tied_to=weight)
        self._soft_cap = soft_cap

    def forward(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        logits_SV = super().forward(hidden_SE).float()
        return logits_SV if self._soft_cap is None else self._soft_cap * torch.tanh(logits_SV / self._soft_cap)
