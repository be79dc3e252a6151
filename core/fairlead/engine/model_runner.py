"""Runs one step on one platform: the only place where model, cache, attention backend and sampler meet."""

from typing import cast

import torch

from fairlead.engine.batch_builder import build_input
from fairlead.interface import AttentionBackend
from fairlead.layers.context import Step
from fairlead.models.registry import CausalLM
from fairlead.sampling.sampler import SamplingBatch, sample
from fairlead.scheduling.batch import SampledToken, ScheduledBatch


class ModelRunner:
    """Shared by all platforms, and made of the parts that they supply; a plugin never subclasses it."""

    def __init__(
        self, model: torch.nn.Module, backend: AttentionBackend, *, block_size: int, device: torch.device
    ) -> None:
        self.model = cast(CausalLM, model)
        self.backend = backend
        self._block_size, self._device = block_size, device
        self.kv_caches: list[object] = []

    def allocate_cache(self, num_blocks: int) -> None:
        """Allocates the KV cache; freed with the runner."""
        self.kv_caches = self.backend.allocate(num_blocks)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> list[SampledToken]:
        """Computes a step; one entry per chunk that samples, in order. Fills the cache as a side effect."""
        inputs = build_input(batch, self._block_size, self._device)
        if batch.block_copies:
            self.backend.copy_blocks(self.kv_caches, batch.block_copies)
        step = Step(backend=self.backend, kv_caches=self.kv_caches, plan=self.backend.plan(inputs.attention))
        hidden_TE = self.model(inputs.token_ids_T, inputs.positions_T, step)
        samplers = [c for c in batch.chunks if c.sample_seed is not None]
        if not samplers:
            return []
        logits_RV = self.model.logits(hidden_TE[inputs.sample_rows_R])
        return sample(logits_RV, SamplingBatch.of(samplers))
