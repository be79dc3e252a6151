"""The model as the platform's graph runner runs it: at the sizes that it asks for.

Shapes: T packed tokens, N rows of them, E model width, V vocabulary.
"""

import torch

from fairlead.engine.batch_builder import Padding
from fairlead.interface import GraphRunner
from fairlead.layers.context import Step
from fairlead.models.registry import CausalLM


class PaddedModel:
    """Pads steps and rows of logits to buckets, and cuts results. Without buckets it adds nothing."""

    def __init__(self, model: CausalLM, graph_runner: GraphRunner) -> None:
        self._model, self.graph_runner = model, graph_runner
        self._max_rows = max(graph_runner.buckets, default=None)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The sizes to run once before the first request."""
        return self.graph_runner.buckets

    def padding(self, num_tokens: int, max_query_len: int, blocks: tuple[int, ...]) -> Padding | None:
        """What fills a step up to its bucket; `blocks` are free for it, one per cache group."""
        size = self.graph_runner.bucket(num_tokens, max_query_len)
        return None if size is None or size == num_tokens else Padding(num_tokens=size - num_tokens, blocks=blocks)

    def hidden(self, token_ids_T: torch.Tensor, positions_T: torch.Tensor, step: Step) -> torch.Tensor:
        """Hidden states (T, E), padding included; writes the cache."""
        return self.graph_runner.run(self._model, token_ids_T, positions_T, step)

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """Logits (N, V) in float32."""
        most = self._max_rows
        if most is not None and len(hidden_NE) > most:
            return torch.cat([self.logits(hidden_NE[i : i + most]) for i in range(0, len(hidden_NE), most)])
        num_rows = len(hidden_NE)
        size = self.graph_runner.bucket(num_rows, 1)
        if size is None or size == num_rows:
            return self._model.logits(hidden_NE)
        filled = torch.cat((hidden_NE, hidden_NE[-1:].expand(size - num_rows, -1)))
        return self._model.logits(filled)[:num_rows]
