"""Token embedding and the output head."""

import torch

from fairlead.layers.context import BuildContext


class Embedding(torch.nn.Module):
    """Token ids (T,) to vectors (T, E)."""

    def __init__(self, vocab_size: int, size: int, ctx: BuildContext) -> None:
        super().__init__()
        self._embedding = ctx.ops.embedding
        self.weight = ctx.weight(vocab_size, size)

    def forward(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        return self._embedding(token_ids_T, self.weight)


class OutputHead(torch.nn.Module):
    """Hidden states (S, E) to logits (S, V) in float32; shares the embedding's weight where `tied_to` is given."""

    def __init__(
        self,
        vocab_size: int,
        size: int,
        ctx: BuildContext,
        *,
        tied_to: Embedding | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self._linear = ctx.ops.linear
        self.weight = ctx.weight(vocab_size, size) if tied_to is None else tied_to.weight
        self.bias = ctx.weight(vocab_size) if bias else None

    def forward(self, hidden_SE: torch.Tensor) -> torch.Tensor:
        return self._linear(hidden_SE, self.weight, self.bias).float()
